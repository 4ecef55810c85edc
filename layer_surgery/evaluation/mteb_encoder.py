"""An embedding model as mteb sees it: its prompts and its similarity are those that mteb's own class for directories of
sentence-transformers finds.
"""

from typing import Any

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from sentence_transformers.util import SimilarityFunction
from torch import Tensor

from layer_surgery.evaluation.text_encoder import TextEncoder


class MtebEncoder(AbsEncoder):  # type: ignore[misc]
    """Vectors of a `TextEncoder` for mteb."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.mteb_model_meta = ModelMeta.create_empty()
        self.model_prompts, _ = AbsEncoder.validate_task_to_prompt_name(
            dict(encoder.prompts), raise_for_invalid_keys=False
        )
        name = encoder.embedder.settings.get("similarity_fn_name") or SimilarityFunction.COSINE
        self._similarity = SimilarityFunction.to_similarity_fn(name)
        self._pairwise = SimilarityFunction.to_similarity_pairwise_fn(name)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> Any:
        """Return the vectors of the texts of a loader, [N, E] float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = get_prompt_name(self.model_prompts, task_metadata, prompt_type)
        prompt = self._encoder.embedder.prompt if name is None else (self.model_prompts or {})[name]
        return self._encoder.encode(texts, prompt).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        found: Tensor = self._similarity(embeddings1, embeddings2)
        return found

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        found: Tensor = self._pairwise(embeddings1, embeddings2)
        return found
