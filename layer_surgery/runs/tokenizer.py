"""The tokenizer beside a checkpoint: loaded, and refused where it is not the model's."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.errors import CheckpointError


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a checkpoint; `CheckpointError` if there is none that can be used."""
    # Where its own files do not say the class, it is that of the architecture, which a result says in its own way.
    base = getattr(checkpoint.config, "base_class", None)
    told = {} if base is None else {"config": base.from_dict(checkpoint.config_fields)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code, local_files_only=True, **told
        )
    except Exception as error:  # transformers raises many types here, each about these few files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {checkpoint.directory} cannot be loaded: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if checkpoint.embedder is not None:
        tokenizer = checkpoint.embedder.prepared(tokenizer)
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise CheckpointError(
            f"the tokenizer in {checkpoint.directory} has model_max_length: {longest!r}; it must be a number."
        )
    return tokenizer


def check_tokenizer(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings: it belongs to another model."""
    rows = checkpoint.vocabulary_size
    largest = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer does not fit the model: it has the token id {largest}, but the embedding of "
            f"{checkpoint.name} has {rows} rows; use the tokenizer that the model was trained with."
        )
