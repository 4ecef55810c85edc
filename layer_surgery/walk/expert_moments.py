"""Second moments of the experts of a layer: of what goes into each output projection, and of the gradient behind it.

While they are taken, the experts are run one after another by a forward pass of our own, the one that transformers'
own kernels stand for (`transformers/integrations/moe.py`): what each token brings to each of its experts is then in
plain sight. Shapes: T tokens, n of them at one expert, E experts, K chosen by a token, I channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.checkpoint.experts import Experts
from layer_surgery.linalg.least_squares import add_gram


@dataclass
class ExpertMoments:
    """Sums over tokens for the experts of one layer.

    The gradients of all experts are in one sum: what they write goes to the same place in the stream, and one matrix
    [D, D] for each of hundreds of experts would be several times the layer. How large the gradients of each are, which
    differs with how often and how strongly it is chosen, is kept for each.
    """

    inputs: Tensor  # [E, I, I], `sum x x^T` over the tokens that chose each expert
    outputs: Tensor  # [D, D], `sum g g^T` over all pairs of a token and an expert that it chose
    squares: Tensor  # [E], `sum |g|^2` for each expert
    chosen: Tensor  # [E] int64, tokens that chose each expert
    tokens: int = 0  #: All tokens.

    def input_moment(self, expert: int) -> Tensor:
        """Return `1/n sum x x^T` [I, I] over the n tokens of an expert; zeros if none chose it."""
        return self.inputs[expert] / max(1, int(self.chosen[expert]))

    def output_moment(self) -> Tensor:
        """Return `1/N sum g g^T` [D, D] over all N pairs of a token and an expert."""
        return self.outputs / max(1, int(self.chosen.sum()))

    def weight(self, expert: int) -> float:
        """Return what turns a cost with these two moments into nats per token (all T of them) for one expert.

        To second order a change of an expert costs `1/2 E[x x^T] (x) E[g g^T]` at each of its n tokens, so n/T of that
        at each token, and its own gradients are `squares / n` large where those of all are the trace of B.
        """
        size = float(self.output_moment().trace())
        return float(self.squares[expert]) / self.tokens / size if size > 0 else 0.0


class ExpertRecorder:
    """Takes the moments of one layer's experts, micro-batch by micro-batch.

    As `MomentRecorder` does for linears: in float32 or better, and padding is left out.
    """

    def __init__(self, experts: Experts, module: nn.Module, *, gradients: bool, owner: int = 0) -> None:
        """Watch `module`, which are these `experts`; with `gradients`, also the loss gradients behind them.

        With several processes the sums are at their `owner`, but for the number of tokens.
        """
        self._experts, self._gradients = experts, gradients
        self._module: Any = module
        weight = module.get_parameter("down_proj")
        self._like = torch.empty(0, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self._sums, self._tokens = parallel.Sums(lambda _name: (owner,)), 0
        self._valid: Tensor | None = None

    @property
    def moments(self) -> ExpertMoments:
        """The sums so far; to be asked for by their owner, after the last round."""
        return ExpertMoments(**self._sums.totals, tokens=self._tokens)

    def start_batch(self, valid: Tensor) -> None:
        """Say which tokens of the micro-batch that comes next count: [B, S] bool."""
        self._valid = valid.flatten()
        self._tokens += int(valid.sum())
        for name in ("inputs", "outputs", "squares", "chosen"):
            self._term(name)  # also of experts that no token chooses

    def end_round(self, present: int) -> None:
        """Bring what the micro-batches of this round add to the owner; see `parallel.Sums`."""
        self._sums.close(present)

    def finish(self) -> None:
        """Count the tokens of all processes; after the last round."""
        self._tokens = parallel.total(self._tokens)

    def _term(self, name: str) -> Tensor:
        number, count, behind = self._experts.number, self._experts.count, self._experts.hidden * self._gradients
        shapes = {"inputs": (number, count, count), "outputs": (behind, behind), "squares": (number,)}
        if name == "chosen":
            return self._sums.term(name, (number,), torch.empty(0, dtype=torch.int64))
        # What experts write is one sum: several of them add to it in a micro-batch.
        return self._sums.term(name, shapes[name], self._like, whole=name == "outputs")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Have the experts run one by one, and watched, for the duration of the block."""
        self._module.forward = self._forward
        try:
            yield
        finally:
            del self._module.forward  # that of its class is behind it

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return what experts add [T, D], of tokens [T, D], the experts of each [T, K] and their weights [T, K]."""
        assert self._valid is not None and len(self._valid) == len(hidden_states), "start_batch comes first"
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, place = torch.where(top_k_index == expert)
            inner = inner_activations(self._experts, self._module, expert, hidden_states[token])
            self._take(expert, inner.detach()[self._valid[token]])
            out = _linear(self._experts, self._module, "down_proj", expert, inner)
            if self._gradients and out.requires_grad:
                out.register_hook(_Taker(self, expert, self._valid[token]))  # type: ignore[no-untyped-call]
            weighted = out * top_k_weights[token, place, None]
            total = total.index_add(0, token, weighted.to(total.dtype))
        return total

    def _take(self, expert: int, rows: Tensor) -> None:
        add_gram(self._term("inputs")[expert], rows.to(self._like.dtype))
        self._term("chosen")[expert] += len(rows)

    def take_gradient(self, expert: int, rows: Tensor) -> None:
        """Add gradients [n, D] at the outputs of an expert."""
        rows = rows.to(self._like.dtype)
        add_gram(self._term("outputs"), rows)
        self._term("squares")[expert] += rows.pow(2).sum()


@dataclass(frozen=True)
class _Taker:
    """Takes the gradient [n, D] at the output of one expert for one micro-batch."""

    recorder: ExpertRecorder
    expert: int
    valid: Tensor  # [n] bool

    def __call__(self, gradient: Tensor) -> None:
        self.recorder.take_gradient(self.expert, gradient.detach()[self.valid])


def inner_activations(experts: Experts, module: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """Return what goes into the output projection of one expert [n, I], of tokens [n, D]."""
    said: Any = module
    before = _linear(experts, module, experts.before, expert, hidden)
    inner: Tensor = said._apply_gate(before) if experts.gated else said.act_fn(before)
    return inner


def _linear(experts: Experts, module: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = module.get_parameter(name)[expert]
    bias = module.get_parameter(f"{name}_bias")[expert] if experts.biased else None
    return nn.functional.linear(x, weight.T if experts.transposed else weight, bias)
