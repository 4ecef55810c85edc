"""Smaller vectors of an embedding model: a linear map behind it, made of the original's vectors of some texts."""

from dataclasses import replace

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import CalibrationConfig
from layer_surgery.errors import DataError, PlanError
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.linalg.nested_map import nested_map
from layer_surgery.runs.session import Session

#: Texts for each number of the original's vectors, where there are as many: fewer are fitted too closely.
_TEXTS = 8


def check_dimensions(checkpoint: Checkpoint, wanted: int | None) -> None:
    """Raise `PlanError` for a number of dimensions that a model cannot have."""
    if wanted is None:
        return
    if checkpoint.embedder is None:
        raise PlanError(
            f"--dimensions {wanted} is for embedding models, and {checkpoint.name} is a {checkpoint.head.words}; leave "
            "it out."
        )
    whole = checkpoint.embedder.dimensions(checkpoint.hidden_size)
    if wanted >= whole:
        raise PlanError(f"--dimensions is {wanted}; allowed: 1 to {whole - 1} (the model's vectors have {whole}).")


def with_dimensions(session: Session, result: Checkpoint, config: CalibrationConfig, wanted: int | None) -> Checkpoint:
    """Return a result whose vectors have so many numbers, the most telling first; None: as it is.

    The map is that after which the original's cosines go most with what they were (`linalg/nested_map.py`), and so it
    is good for what the result keeps of them.
    Raises `DataError` if there are fewer different texts than numbers.
    """
    if wanted is None:
        return result
    embedder = result.embedder
    assert embedder is not None
    whole = embedder.dimensions(result.hidden_size)
    with session.stage("dimensions"):
        tokens = session.texts(config, _TEXTS * whole)
        vectors = text_vectors(session.stream(session.checkpoint), tokens, session.settings)
        try:
            mapping = nested_map(vectors, wanted)
        except ValueError as error:
            raise DataError(f"--dimensions {wanted} cannot be made of {tokens.sequences} texts: {error}.") from error
    session.ui.note(f"dimensions: {wanted} of {whole}, from {tokens.sequences:,} texts of '{tokens.name}'")
    return replace(result, embedder=embedder.mapped(*(each.to(result.dtype) for each in mapping)))
