"""An embedding model as a function from texts to vectors, one of its layers in memory at a time.

Shapes: N texts, S tokens of the longest, D hidden, E numbers of a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layer_surgery.checkpoint.embedder import Embedder
from layer_surgery.data.passages import pack_as_used
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.progress import Progress, no_progress
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import WalkSettings


@dataclass(frozen=True)
class TextEncoder:
    """A model, its tokenizer and how much memory a walk may take."""

    model: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    settings: WalkSettings

    @property
    def embedder(self) -> Embedder:
        """What makes the transformer an embedding model."""
        found = self.model.checkpoint.embedder
        assert found is not None
        return found

    @property
    def prompts(self) -> Mapping[str, str]:
        """What stands before texts, by name: `query` and `document` are always among them, as its users have them."""
        return {"query": "", "document": ""} | {
            name: prompt or "" for name, prompt in (self.embedder.settings.get("prompts") or {}).items()
        }

    def encode(self, texts: Sequence[str], prompt: str, progress: Progress = no_progress) -> Tensor:
        """Return the vectors of texts behind a prompt, [N, E] float32 on the CPU.

        Texts that are longer than the model takes are cut off, as wherever it is used. So many are walked over together
        as have their hidden states in memory.
        """
        tokens, _ = pack_as_used("texts", texts, self.tokenizer, self.model.checkpoint.objective, prompt=prompt)
        row_bytes = tokens.sequence_length * self.model.hidden_size * self.model.dtype.itemsize
        together = max(self.settings.batch_size, self.settings.boundary_memory_bytes // row_bytes)
        order = tokens.valid.sum(dim=1).argsort(descending=True, stable=True)
        settings = replace(self.settings, progress=progress)
        parts = [text_vectors(self.model, tokens.select(rows), settings) for rows in torch.split(order, together)]
        return torch.cat(parts)[order.argsort()].float().cpu()
