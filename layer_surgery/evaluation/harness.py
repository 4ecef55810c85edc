"""A model in memory as lm-eval sees it: lm-eval's own class for transformers, with our batch size and progress."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.devices import available_memory_bytes
from layer_surgery.progress import Progress

#: Memory for the logits of a batch on a CPU. Fixed, so that batches are the same on every run; on CUDA a quarter of
#: what is free.
CPU_LOGITS_BYTES = 1 << 29
LARGEST_BATCH = 64
#: Logits, their log-softmax and what the model makes on the way, in float32.
_COPIES = 3


class HarnessModel(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM` on a model that is loaded already; neither the model nor the tokenizer is changed."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        # lm-eval gives the tokenizer a padding token.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size="auto")
        self._progress = progress

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Return how many sequences fit, by arithmetic: lm-eval tries until memory runs out, which kills on a CPU.

        `requests` are (text, context ids, continuation ids), the longest first from `pos` on.
        """
        length = int(self.max_length)
        if requests:
            length = min(length, len(requests[pos][1]) + len(requests[pos][2]))
        budget = CPU_LOGITS_BYTES
        if self.device.type != "cpu":
            budget = (available_memory_bytes(self.device) or budget) // 4
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        return int(max(1, min(LARGEST_BATCH, budget // (length * vocabulary * 4 * _COPIES))))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._reporting(requests):
            return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self._reporting(requests):
            return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._reporting(requests):
            return list(super().generate_until(requests, disable_tqdm=True))

    @contextmanager
    def _reporting(self, requests: list[Any]) -> Iterator[None]:
        """Show progress through the hook that lm-eval calls after every answer (it is for caches)."""
        hook = self.cache_hook
        with self._progress("tasks", len(requests)) as advance:
            self.set_cache_hook(SimpleNamespace(add_partial=lambda *_answer: advance()))
            try:
                yield
            finally:
                self.set_cache_hook(hook)
