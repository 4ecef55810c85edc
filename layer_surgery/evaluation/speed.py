"""Speed and memory of generation, or of models that generate nothing: two models take turns in one run, so that what
else the machine does hits both.

Wall time of this machine through transformers' own modules, greedily and with a KV cache. It compares models; it is
not what a serving engine reaches.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from layer_surgery.config import SpeedConfig
from layer_surgery.devices import (
    now,
    peak_device_memory_bytes,
    reset_peak_device_memory,
    torchs_products,
    used_memory_bytes,
    wait_for,
)
from layer_surgery.progress import Progress
from layer_surgery.records import SpeedPoint


@dataclass
class _Timings:
    """Of all runs of one model at one point, in seconds."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)  #: Of all steps of a run together.
    steps: list[float] = field(default_factory=list)


@torch.no_grad()
@torchs_products()
def measure_speed(
    models: Sequence[PreTrainedModel], config: SpeedConfig, progress: Progress, seed: int, *, generates: bool = True
) -> list[list[SpeedPoint]]:
    """Return the points of each model, in the order of `models`; every batch size with every prompt length.

    The prompts are random tokens of the smallest vocabulary: the time does not depend on which tokens they are.
    Each point begins with a run of every model that does not count. Models of which `generates` is False, encoders and
    classifiers, are called once for each batch.
    """
    new_tokens = config.speed_new_tokens if generates else 0
    points: list[list[SpeedPoint]] = [[] for _ in models]
    vocabulary = min(int(model.get_input_embeddings().weight.shape[0]) for model in models)
    shapes = [(batch, length) for batch in config.speed_batch_sizes for length in config.speed_lengths]
    with progress("speed", len(shapes) * (config.speed_repeats + 2) * len(models)) as advance:
        for batch, length in shapes:
            generator = torch.Generator().manual_seed(seed)
            prompt = torch.randint(vocabulary, (batch, length), generator=generator).to(models[0].device)
            timings = [_Timings() for _ in models]
            for turn in range(config.speed_repeats + 1):
                # The one that goes first changes, so that no model always finds the caches as the other left them.
                order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
                for k in order:
                    _run(models[k], prompt, new_tokens, timings[k] if turn else _Timings())
                    advance()
            for k, model in enumerate(models):
                peak = generation_memory_bytes(model, prompt, min(2, new_tokens))
                points[k].append(_point(timings[k], peak, prompt, new_tokens, config.speed_repeats))
                advance()
    return points


def generation_memory_bytes(model: PreTrainedModel, prompt: Tensor, steps: int = 2) -> int:
    """Return the bytes of the model's weights and buffers, and the most that tensors take beside them in generation.

    On a CPU tensors are followed one by one, so that other models and freed memory in the same process do not count;
    scratch memory inside of an operation is not seen there.
    """
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    weights: int = sum(stored.values())
    if peak_device_memory_bytes(prompt.device) is not None:
        wait_for(prompt.device)
        reset_peak_device_memory(prompt.device)
        before = used_memory_bytes(prompt.device)
        _run(model, prompt, steps, _Timings())
        return weights + (peak_device_memory_bytes(prompt.device) or 0) - before
    allocations = Allocations()
    with allocations:
        _run(model, prompt, steps, _Timings())
    return weights + allocations.peak_bytes


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that operations return inside the block: `peak_bytes` of them at a time.

    Only what the block makes counts: not what was there before, and not memory that the allocator holds back. Scratch
    memory inside of an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._now = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what an operation is given was there before it, or is known
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), counts=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), counts=True)
        return result

    def _follow(self, storage: torch.UntypedStorage, *, counts: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0

        def gone(_reference: Any) -> None:
            self._now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak_bytes = max(self.peak_bytes, self._now)


def _run(model: PreTrainedModel, prompt: Tensor, new_tokens: int, timings: _Timings) -> None:
    """Generate greedily after `prompt` [B, L]; the first token comes from the prefill. With 0 tokens, run it only."""
    start = now(prompt.device)
    if new_tokens == 0:
        model(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        timings.prefill.append(now(prompt.device) - start)
        return
    # As generation does: logits are needed for the last token only.
    output: Any = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    begin = last = now(prompt.device)
    timings.prefill.append(begin - start)
    for _step in range(new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
        end = now(prompt.device)
        timings.steps.append(end - last)
        last = end
    timings.decode.append(last - begin)


def _point(timings: _Timings, peak: int, prompt: Tensor, new_tokens: int, repeats: int) -> SpeedPoint:
    batch, length = prompt.shape
    prefill = median(timings.prefill)
    p50, p95 = map(float, np.quantile(timings.steps, [0.5, 0.95])) if new_tokens else (None, None)
    return SpeedPoint(
        batch_size=batch,
        prompt_tokens=length,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_tokens_per_second=batch * length / prefill,
        decode_tokens_per_second=batch * (new_tokens - 1) / median(timings.decode) if new_tokens else None,
        time_to_first_token_seconds=prefill,
        latency_p50_seconds=p50,
        latency_p95_seconds=p95,
        peak_memory_bytes=peak,
    )
