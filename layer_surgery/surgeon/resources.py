"""What the parts of a model take of each resource that can be scarce: parameters, operations, KV cache, time.

A target is a fraction of what the original takes. Prices are those of what surgery can change; the rest (embeddings,
norms, the head) is there in any case.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layer_surgery import parallel
from layer_surgery.calibration.units import attention_heads
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.costs import cache_bytes_by_layer, token_costs
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.devices import now, torchs_products
from layer_surgery.errors import PlanError
from layer_surgery.surgeon.curves import Floats

Amount = float | NDArray[Any]

PARAMETERS, FLOPS, CACHE, TIME = "parameters", "flops", "kv_cache_bytes", "milliseconds"
#: Resources other than parameters, with the options that limit them.
OPTIONS = {FLOPS: "--target-flops", CACHE: "--target-kv-cache", TIME: "--target-time"}
#: Numbers that a removed attention keeps in the cache for each token, one for keys and one for values.
_PLACEHOLDER = 2
#: Widths between two ends at which a product is timed, repetitions of each, and bytes of weights it goes through.
_WIDTHS, _REPEATS, _BYTES = 7, 15, 1 << 24
#: Weights of more bytes are timed in part.
_LARGE = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """Prices in all resources that are limited, and in parameters."""

    totals: Mapping[str, float] = field(default_factory=dict)  #: Of the original, in each resource but parameters.
    context: int = 0  #: Tokens that operations are counted behind.
    score_widths: Sequence[int] = ()  #: Width of the queries of each layer; 0 where it is not known.
    cache_bytes: Sequence[int] = ()  #: That a token adds to the cache of each layer.
    placeholder: int = 0  #: Bytes a token of a removed attention.
    milliseconds: Callable[[Amount, Amount], Floats] | None = None
    """Time of the product of a weight (out, in) with one token."""

    def of(
        self,
        index: int,
        part: str,
        sizes: Sequence[tuple[Amount, Amount]],
        *,
        less: Amount = 0.0,
        share: Amount = 1.0,
    ) -> dict[str, Floats]:
        """Return the prices [n] of linears of a layer.

        Args:
            part: `attention` if it is all of the attention: with its scores and its cache.
            sizes: (out, in) of the weights, numbers or arrays [n].
            less: parameters of biases that are not there any more.
            share: of the heads that are left, 0 to 1.
        """
        weights: Floats = sum((np.asarray(np.float64(1) * out * in_) for out, in_ in sizes), start=np.zeros(()))
        left: Floats = np.asarray(share, dtype=np.float64)
        found: dict[str, Floats] = {PARAMETERS: np.asarray(weights - less)}
        if FLOPS in self.totals:
            scores = 4.0 * self.context * self.score_widths[index] if part == "attention" else 0.0
            found[FLOPS] = 2.0 * weights + scores * left
        if CACHE in self.totals:
            whole = self.cache_bytes[index] if part == "attention" else 0
            found[CACHE] = np.where(left > 0, whole * left, min(whole, self.placeholder)) + 0.0 * weights
        if TIME in self.totals:
            assert self.milliseconds is not None
            found[TIME] = sum((self.milliseconds(out, in_) for out, in_ in sizes), start=0.0 * weights)
        return found

    def of_fewer_experts(self, experts: Experts, counts: Amount) -> dict[str, Floats]:
        """Return the prices [n] of so many whole experts of a layer: a token still goes through as many of them."""
        found = self.of_experts(experts, experts.count + np.zeros(np.shape(counts)))
        gone: Floats = experts.number - np.asarray(counts, dtype=np.float64)
        return {**found, PARAMETERS: found[PARAMETERS] - gone * experts.price_of_one}

    def of_experts(self, experts: Experts, widths: Amount) -> dict[str, Floats]:
        """Return the prices [n] of the experts of a layer with so many channels each.

        All of them are there, and a token goes through those that it chooses.
        """
        width: Floats = np.asarray(widths, dtype=np.float64)
        found: dict[str, Floats] = {PARAMETERS: experts.price * width}
        if FLOPS in self.totals:
            found[FLOPS] = 2.0 * experts.chosen * (experts.parts + 1) * experts.hidden * width
        if CACHE in self.totals:
            found[CACHE] = 0.0 * width
        if TIME in self.totals:
            assert self.milliseconds is not None
            both = self.milliseconds(experts.parts * width, experts.hidden) + self.milliseconds(experts.hidden, width)
            found[TIME] = experts.chosen * both
        return found


def pricing_of(
    checkpoint: Checkpoint, limited: Collection[str], context: int, device: torch.device, dtype: torch.dtype
) -> Pricing:
    """Return the prices of a checkpoint's parts in the resources that are `limited`.

    Operations are counted behind `context` tokens. Time is measured on `device` in `dtype`, now: two runs may come to
    different plans. Raises `PlanError` for what cannot be counted for this architecture.
    """
    totals: dict[str, float] = {}
    cache = cache_bytes_by_layer(checkpoint) if CACHE in limited else []
    if CACHE in limited:
        countable = cache if cache is not None and len(cache) == checkpoint.layer_count else None
        totals[CACHE] = _counted(CACHE, None if countable is None else sum(countable), checkpoint)
    widths = []
    if FLOPS in limited:
        totals[FLOPS] = _counted(FLOPS, token_costs(checkpoint, context).flops, checkpoint)
        for layer in checkpoint.layers:
            heads = attention_heads(layer, checkpoint.architecture)
            widths.append(heads.count * heads.size if heads is not None else 0)
    table = TimeTable(device, dtype) if TIME in limited else None
    if table is not None:
        skeleton = checkpoint.skeleton
        head = skeleton.get_output_embeddings().weight.shape
        named = [layer.get_submodule(name) for layer in checkpoint.layers for name in _linears(layer, checkpoint)]
        totals[TIME] = sum(float(table(out, in_)) for out, in_ in [head, *(linear.weight.shape for linear in named)])
        for experts in (found for layer in checkpoint.layers if (found := experts_of(layer)) is not None):
            up, down = table(experts.parts * experts.count, experts.hidden), table(experts.hidden, experts.count)
            totals[TIME] += experts.chosen * float(up + down)
    return Pricing(
        totals=totals,
        context=context,
        score_widths=widths,
        cache_bytes=cache or [],
        placeholder=_PLACEHOLDER * checkpoint.dtype.itemsize,
        milliseconds=table,
    )


def _linears(layer: torch.nn.Module, checkpoint: Checkpoint) -> list[str]:
    modules = dict(layer.named_modules())
    return [name for name in checkpoint.architecture.linears if isinstance(modules.get(name), torch.nn.Linear)]


def _counted(resource: str, total: Any, checkpoint: Checkpoint) -> float:
    if not total:
        raise PlanError(
            f"{OPTIONS[resource]} needs to know what a token of {checkpoint.name} takes, and that cannot be counted "
            "without its weights for this architecture; give --target-parameters instead."
        )
    return float(total)


class TimeTable:
    """Milliseconds of a product with one token on this machine, as generation has them; measured once for each size.

    Of a row of sizes a few are measured, and the others lie on the lines between them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, out: Amount, in_: Amount) -> Floats:
        """Return the milliseconds [n] of weights (out, in); of the two, one is the same for all."""
        outs, ins = np.broadcast_arrays(np.asarray(out, dtype=np.int64), np.asarray(in_, dtype=np.int64))
        if outs.size == 1:
            return np.full(outs.shape, self._of(int(outs.flat[0]), int(ins.flat[0])))
        sizes, along = np.stack([outs, ins], axis=1), (ins if (outs == outs[0]).all() else outs)
        order = np.argsort(along)
        few = order[np.unique(np.linspace(0, len(order) - 1, _WIDTHS).astype(int))]
        found = [self._of(*map(int, sizes[k])) for k in few]
        # A wider product is not faster: what says so is noise, and would have the search chase it.
        measured = np.maximum.accumulate(found)
        times: Floats = np.interp(along, along[few], measured)
        return times

    @torchs_products()  # one row, as in generation
    @torch.no_grad()
    def _of(self, out: int, in_: int) -> float:
        if (out, in_) not in self._known:
            parts = max(1, out * in_ * self._dtype.itemsize // _LARGE)  # of a large one some rows are timed
            x = torch.randn(1, in_, device=self._device, dtype=self._dtype)
            # More than one weight, as in a model: the caches are not to hold it from one time to the next.
            count = max(1, min(32, _BYTES // (out * in_ * self._dtype.itemsize)))
            weights = [torch.randn(out // parts, in_, device=self._device, dtype=self._dtype) for _ in range(count)]
            times = []
            for repeat in range(_REPEATS + 1):
                start = now(self._device)
                for weight in weights:
                    torch.nn.functional.linear(x, weight)
                if repeat:
                    times.append((now(self._device) - start) / count)
            # The first process's clock counts, so that all plan with the same prices.
            self._known[out, in_] = parallel.from_first(lambda: 1e3 * parts * median(times))
        return self._known[out, in_]
