"""Second moments of what goes into a linear and of the loss gradient at what comes out of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.linalg.least_squares import add_gram, add_product


@dataclass
class LayerMoments:
    """Sums over tokens for the linears of one layer, those of a linear at the process that owns it.

    Linears that read the same tensor (q, k and v; gate and up) share one input sum.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """`sum x x^T` [in, in], by the first linear that read the input."""
    reads: dict[str, str] = field(default_factory=dict)  #: For each linear, whose entry in `inputs` is its own.
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """`sum g g^T` [out, out], with g the gradient of the summed loss at the linear's output."""
    tokens: int = 0

    def input_moment(self, linear: str) -> Tensor:
        """Return `A = 1/T sum x x^T` [in, in]."""
        return self.inputs[self.reads[linear]] / self.tokens

    def output_moment(self, linear: str) -> Tensor:
        """Return `B = 1/T sum g g^T` [out, out]."""
        return self.outputs[linear] / self.tokens


class MomentRecorder:
    """Takes the moments of some linears of one layer through hooks, micro-batch by micro-batch.

    Products are formed and summed in float32 (float64 where the model computes in it). Padding is left out. With
    several processes, sums are at the owner of each linear (the first process where `owner_of` does not say).
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], *, gradients: bool, owner_of: Mapping[str, int] | None = None
    ) -> None:
        self._owner_of = owner_of or {}
        self._inputs, self._outputs = parallel.Sums(self._owners_of_input), parallel.Sums(self._owner)
        self.moments = LayerMoments(inputs=self._inputs.totals, outputs=self._outputs.totals)
        self._linears, self._gradients = linears, gradients
        self._valid: Tensor | None = None
        self._seen: list[tuple[Tensor, str]] = []
        self._called: set[str] = set()

    def start_batch(self, valid: Tensor) -> None:
        """Say which tokens of the micro-batch that comes next count: [B, S] bool."""
        self._valid = valid
        self._seen.clear()
        self._called.clear()
        self.moments.tokens += int(valid.sum())

    def end_round(self, present: int) -> None:
        """Bring what the micro-batches of this round add to the owners; see `parallel.Sums`."""
        self._inputs.close(present)
        self._outputs.close(present)

    def finish(self) -> None:
        """Count the tokens of all processes; after the last round."""
        self.moments.tokens = parallel.total(self.moments.tokens)

    def _owner(self, name: str) -> Iterable[int]:
        return (self._owner_of.get(name, 0),)

    def _owners_of_input(self, reader: str) -> Iterable[int]:
        return (owner for name, of in self.moments.reads.items() if of == reader for owner in self._owner(name))

    @contextmanager
    def recording(self) -> Iterator[LayerMoments]:
        """Have the hooks in for the duration of the block."""
        with ExitStack() as hooks:
            hooks.callback(self._seen.clear)
            for name, linear in self._linears.items():
                hooks.callback(linear.register_forward_hook(partial(self._see, name)).remove)
            yield self.moments

    def _see(self, name: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if name in self._called:
            return  # DeBERTa's queries and keys go over the embeddings of positions too, after the tokens
        self._called.add(name)
        self._take_input(name, arguments[0].detach())
        if self._gradients and output.requires_grad:
            output.register_hook(partial(self._add, self._outputs, name))  # type: ignore[no-untyped-call]

    def _take_input(self, name: str, x: Tensor) -> None:
        for seen, reader in self._seen:
            if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape:
                self.moments.reads[name] = reader
                return
        self._seen.append((x, name))
        self.moments.reads[name] = name
        self._add(self._inputs, name, x)

    def _add(self, sums: parallel.Sums, name: str, values: Tensor) -> None:
        assert self._valid is not None, "start_batch comes first"
        rows = rows_of(values.detach(), self._valid).to(torch.promote_types(values.dtype, torch.float32))
        add_gram(sums.term(name, (rows.shape[1], rows.shape[1]), rows), rows)


@dataclass
class MapSums:
    """Sums over tokens of what one module reads, x [D], and gives, y [E]."""

    inputs: Tensor  #: `sum x` [D].
    outputs: Tensor  #: `sum y` [E].
    input_squares: Tensor  #: `sum x x^T` [D, D].
    output_squares: Tensor  #: `sum y y^T` [E, E].
    products: Tensor  #: `sum y x^T` [E, D].
    tokens: int = 0


class MapRecorder:
    """Takes the sums of a module's input and output, both [B, S, D], through a hook. Padding is left out.

    Sums are in float32 (float64 where the model computes in it). With several processes they are at their `owner`.
    """

    def __init__(self, module: nn.Module, owner: int = 0) -> None:
        self._module, self._tokens = module, 0
        self._valid: Tensor | None = None
        self._sums = parallel.Sums(lambda _name: (owner,))

    @property
    def sums(self) -> MapSums | None:
        """The sums so far; None until tokens have passed, and at a process that does not own them."""
        return MapSums(**self._sums.totals, tokens=self._tokens) if self._sums.totals else None

    def start_batch(self, valid: Tensor) -> None:
        """Say which tokens of the micro-batch that comes next count: [B, S] bool."""
        self._valid = valid

    def end_round(self, present: int) -> None:
        """Bring what the micro-batches of this round add to the owner; see `parallel.Sums`."""
        self._sums.close(present)

    def finish(self) -> None:
        """Count the tokens of all processes; after the last round."""
        self._tokens = parallel.total(self._tokens)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Have the hook in for the duration of the block."""
        hook = self._module.register_forward_hook(self._see)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        assert self._valid is not None, "start_batch comes first"
        x, y = (
            rows_of(values.detach(), self._valid).to(torch.promote_types(values.dtype, torch.float32))
            for values in (arguments[0], output)
        )
        d, e = x.shape[1], y.shape[1]
        sums = self._sums
        sums.term("inputs", (d,), x).add_(x.sum(dim=0))
        sums.term("outputs", (e,), x).add_(y.sum(dim=0))
        add_gram(sums.term("input_squares", (d, d), x), x)
        add_gram(sums.term("output_squares", (e, e), x), y)
        add_product(sums.term("products", (e, d), x), y, x)
        self._tokens += len(x)


def rows_of(values: Tensor, valid: Tensor) -> Tensor:
    """Return the rows [n, D] of `values` that belong to valid tokens (`valid` is [B, S]).

    Architectures call linears with [B, S, D], with [B S, D] (shared experts), with [B, S, heads, D] or with
    [B, heads, S, D] (DeepSeek's latent keys).
    """
    batch, length = valid.shape
    if values.shape[:2] == valid.shape:
        rows = values[valid]
    elif values.dim() == 2 and values.shape[0] == batch * length:
        rows = values[valid.flatten()]
    elif values.dim() == 4 and (values.shape[0], values.shape[2]) == (batch, length):
        rows = values.transpose(1, 2)[valid]
    else:
        raise ValueError(f"a linear was called with {list(values.shape)} for {batch} x {length} tokens")
    return rows.reshape(-1, values.shape[-1])
