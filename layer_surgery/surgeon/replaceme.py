"""ReplaceMe: a run of removed layers becomes one linear map, folded into the MLP before it.

Shopkhoev et al., ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization.
"""

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.calibration.statistics import check_tokens
from layer_surgery.errors import PlanError
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.layer_pair import residual_scales, run_watched, scales_of_all
from layer_surgery.surgeon.plan import runs_behind_a_layer
from layer_surgery.walk.walk import Walk


@METHODS.add(
    "replaceme",
    needs_data=True,
    moments=True,
    needs_boundaries=True,
    removes=True,
    behind=True,
)
def replaceme(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Solve `min_T |s M T + Y - L|^2` for each removed run; `T^T W` takes the place of the MLP's output projection W.

    M is the output of the MLP before the run, s what the architecture multiplies it with (mostly 1), Y the stream that
    it is added to, L the stream after the run, all of the original. The paper removes one contiguous block; here every
    run of removed layers gets its own map. Least squares as in the paper, without a ridge beyond what float64 needs.
    """
    walk = context.walk
    runs = runs_behind_a_layer(plan)
    check_tokens(walk.all_tokens, context.model.hidden_size, "replaceme")
    walk.forward(range(context.model.layer_count), keep=True, steps=context.boundaries)
    with context.progress("solving", len(runs)) as advance:
        for first, after in context.unfinished(runs, str):
            name, transform = _best_map(walk, first - 1, after)
            weight = f"{context.model.checkpoint.layer_prefix(first - 1)}{name}.weight"
            stored = context.model.read_weights([weight])[weight].double()
            context.write_alike(first - 1, name, {"weight": transform.T @ stored})
            advance()
    return plan


@torch.no_grad()
def _best_map(walk: Walk, index: int, after: int) -> tuple[str, Tensor]:
    """Return the MLP's output projection, and T [D, D] float64 with `s M T ~ L - Y` over the valid tokens."""
    width = walk.model.hidden_size
    sums, like = parallel.Sums(), torch.empty(0, dtype=torch.float64, device=walk.model.device)
    with walk.model.layer(index) as layer:
        name, scale = _mlp_out(walk, index, layer)
        for rows, present in walk.share.rounds:
            if rows is not None:
                hidden = walk.boundary(index).read(rows)
                call = walk.rehearsal.call(index, walk.tokens.inputs(rows))
                output, seen = run_watched(layer, [name], call, hidden)
                valid = walk.tokens.valid[rows].to(hidden.device)
                mlp = scale * seen.outputs[name][valid].double()
                wanted = walk.boundary(after).read(rows)[valid].double() - (output[valid].double() - mlp)
                sums.term("gram", (width, width), like).add_(mlp.T @ mlp)
                sums.term("products", (width, width), like).add_(mlp.T @ wanted)
            sums.close(present)
    solution: Tensor | None = None
    if parallel.is_first():
        gram, products = sums.totals["gram"], sums.totals["products"]
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        solution = torch.linalg.solve(gram, products)
    return name, parallel.broadcast(solution, 0, walk.model.device)


def _mlp_out(walk: Walk, index: int, layer: nn.Module) -> tuple[str, float]:
    """Return the MLP's output projection, and what the layer multiplies its output with.

    Raises `PlanError` if a map cannot be folded into it.
    """
    architecture, modules = walk.model.architecture, dict(layer.named_modules())
    attention_out, name = (
        next((name for name in reversed(names) if name in modules), "")
        for names in (architecture.attention, architecture.mlp)
    )
    projection = modules[name]
    if name and not isinstance(projection, nn.Linear):
        raise PlanError(
            f"--method replaceme folds a map into '{name}' of layer {index}, which is low-rank already; choose other "
            "layers."
        )
    if getattr(projection, "bias", None) is not None:
        raise PlanError("--method replaceme folds a map into a projection without bias; this model's have one.")
    rows = next(walk.batches())
    hidden, call = walk.boundary(index).read(rows), walk.rehearsal.call(index, walk.tokens.inputs(rows))
    scales = scales_of_all(residual_scales(layer, attention_out, name, call, hidden))
    if scales is None:
        raise PlanError(
            "--method replaceme needs a layer that adds the output of its MLP to the stream as it is, and layer "
            f"{index} of this {architecture.model_type} model does not (a norm or experts are in between); use another "
            "method."
        )
    return name, scales.mlp
