"""Which parameters of a student are trained.

Those of an embedding model's modules behind the transformer have names of their own, which begin with `BEHIND`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.modeling_layer_surgery import LowRankLinear
from layer_surgery.config.healing import Trained
from layer_surgery.errors import UserError
from layer_surgery.records import SurgeryPlan

#: Of the layers that are trained with `last`: one in so many, from the end.
_LAST_SHARE = 4
#: Before the name of a parameter in the modules behind a transformer. No parameter of a model is called so.
BEHIND = "behind/"


def trained_names(student: Checkpoint, plan: SurgeryPlan, train: Trained) -> set[str]:
    """Return the names of the parameters that are trained; with `lora`, of those that are beside the adapters.

    Norms and biases, that is all parameters with one dimension, are always among them but for `head`, which leaves the
    rest of the model alone. Tied parameters have the name under which the model lists them first.

    Raises `UserError` if there is nothing of what was asked for.
    """
    parameters = dict(student.skeleton.named_parameters())
    prefix = f"{student.architecture.layers}."
    behind = [f"{BEHIND}{name}" for name in student.embedder.weights] if student.embedder is not None else []
    chosen: Iterable[str]
    if train == "all":
        chosen = [*parameters, *behind]
    elif train == "lora":
        chosen = ()
    elif train == "factors":
        smaller = tuple(f"{name}." for name in smaller_linears(student))
        chosen = [name for name in parameters if name.startswith(smaller)] if smaller else []
    elif train == "operated":
        layers = tuple(f"{prefix}{position}." for position in changed_positions(plan))
        chosen = [name for name in parameters if name.startswith(layers)] if layers else []
    else:
        count = student.layer_count
        share = max(1, count // _LAST_SHARE) if train == "last" else 0
        last = tuple(f"{prefix}{position}." for position in range(count - share, count))
        head, headed = student.skeleton.get_output_embeddings(), student.skeleton.base_model is not student.skeleton
        body = f"{student.skeleton.base_model_prefix}." if headed else ""  # all of an embedding model's transformer
        in_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        chosen = [
            name
            for name, value in parameters.items()
            if name.startswith(last) or id(value) in in_head or not name.startswith(body)
        ] + behind
    found = set(chosen)
    if not found and train in ("factors", "operated"):
        raise UserError(
            f"--train {train} finds nothing to train: {student.name} has no "
            + ("linear that the surgery made smaller" if train == "factors" else "layer that the surgery changed")
            + "; take --train all."
        )
    if train == "head":
        check_head(student)
        return found
    return found | {name for name, value in parameters.items() if value.dim() == 1}


def check_head(student: Checkpoint) -> None:
    """Raise `UserError` for an embedding model whose head has no weights."""
    if student.embedder is not None and not student.embedder.weights:
        raise UserError(
            f"--train head finds nothing to train: no module behind the transformer of {student.name} has weights; "
            "take --train last."
        )


def numbers_of(student: Checkpoint, names: set[str]) -> int:
    """Return how many numbers the named parameters have."""
    behind = student.embedder.weights if student.embedder is not None else {}
    every = [*student.skeleton.named_parameters(), *((f"{BEHIND}{name}", value) for name, value in behind.items())]
    return sum(value.numel() for name, value in every if name in names)


def smaller_linears(student: Checkpoint) -> list[str]:
    """Return the names of the linears that the surgery made smaller: low-rank ones, and those with fewer channels."""
    return [*student.low_rank, *student.narrowed]


def changed_positions(plan: SurgeryPlan) -> list[int]:
    """Return the positions in the student of layers that the plan changed, and of those before a removed run."""
    surviving = plan.surviving
    following = [*surviving[1:], len(plan.layers)]
    return [
        position
        for position, (index, after) in enumerate(zip(surviving, following, strict=True))
        if plan.layers[index].action != "keep" or after > index + 1
    ]


def adapter_targets(model: nn.Module, layers: str) -> list[str]:
    """Return the names of the linears in the decoder layers that adapters can go on.

    Of a low-rank linear both factors. Raises `UserError` if there is none.
    """
    prefix = f"{layers}."
    found = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear) and not isinstance(module, LowRankLinear)
    ]
    if not found:
        raise UserError(
            "--train lora finds no linear in the layers that adapters could go on; take --train all or --train last."
        )
    return found
