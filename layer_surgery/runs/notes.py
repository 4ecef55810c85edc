"""Notes for the user about what a session has opened: the data, and what is special about the model."""

from __future__ import annotations

from collections.abc import Iterator

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.data.tokens import PackedTokens


def evaluation_note(tokens: PackedTokens) -> str:
    """Return how much of an evaluation text is measured on."""
    if tokens.objective.problem == "embedding":
        return f"evaluation: {tokens.sequences:,} texts of '{tokens.name}', {int(tokens.valid.sum()):,} tokens"
    if tokens.objective.labelled:
        documents = tokens.sequences if tokens.documents is None else int(tokens.documents.max()) + 1
        divided = f" in {tokens.sequences:,} windows" if documents < tokens.sequences else ""
        return f"evaluation: {documents:,} examples of '{tokens.name}'{divided}, {int(tokens.valid.sum()):,} tokens"
    return (
        f"evaluation: {int(tokens.valid.sum()):,} of the {tokens.tokens_available:,} tokens of "
        f"'{tokens.name}', in {tokens.sequences} windows of {tokens.sequence_length}"
    )


def calibration_notes(tokens: PackedTokens) -> Iterator[str]:
    """Yield a line for each source; in a mixture with its part of the loss, which its weight does not tell."""
    mixed = len(tokens.sources) > 1
    for source in tokens.sources:
        weight = f" (weight {source.weight:g})" if mixed else ""
        if tokens.objective.problem == "embedding":
            yield f"calibration: {source.sequences:,} texts of '{source.name}'{weight}, {source.tokens:,} tokens"
            continue
        if tokens.objective.labelled:
            yield f"calibration: {source.sequences:,} examples of '{source.name}'{weight}, {source.tokens:,} tokens"
            continue
        part = f", {100 * source.predicted_tokens / tokens.predicted_tokens:.1f} % of all that do" if mixed else ""
        yield (
            f"calibration: {source.tokens:,} of the {source.tokens_available:,} tokens of '{source.name}'{weight}, "
            f"as {source.sequences} x {tokens.sequence_length}; {source.predicted_tokens:,} carry loss{part}"
        )


def notes_on(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what is special about an opened checkpoint."""
    architecture = checkpoint.architecture
    if architecture.guessed:
        kind = type(checkpoint.layers[0]).__name__
        linears = ", ".join(architecture.linears)
        yield (
            f"the architecture '{architecture.model_type}' is not listed; guessing that its decoder layers are "
            f"'{architecture.layers}' ({checkpoint.layer_count} x {kind}), "
            + (f"with the linears {linears}" if linears else "which can be removed but not made low-rank")
        )
    if checkpoint.left_out:
        yield (
            f"{len(checkpoint.left_out)} tensors that transformers does not use (the first is "
            f"'{checkpoint.left_out[0]}'; heads that predict further tokens are such) are left out of the result"
        )
