"""Measurements of an embedding model: on texts, and on the bundled retrieval sets."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.data.passages import pack_as_used
from layer_surgery.data.retrieval import RetrievalSet, bundled_retrieval_sets
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.evaluation.embedding import RetrievalVectors, TextVectors, embedding_quality, halves
from layer_surgery.evaluation.vectors import nearness, text_vectors
from layer_surgery.records import TaskResult
from layer_surgery.records.embedding import EmbeddingQuality
from layer_surgery.runs.session import Session

#: Names that models give to the prompts before queries and before documents (as `encode_query` of
#: sentence-transformers looks for them).
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")


#: Most texts of which all pairs are compared, at every size and in every storage: work grows with their square.
_MOST_TEXTS = 400


def _some(vectors: Tensor) -> Tensor:
    """Return the vectors of `_MOST_TEXTS` texts at most, spread over all of them."""
    return vectors[:: -(-len(vectors) // _MOST_TEXTS)]


class EmbeddingTexts:
    """All texts that embedding models are measured on, as tokens. Made once: the models read the same."""

    def __init__(self, session: Session, texts: Sequence[PackedTokens]) -> None:
        """Pack the retrieval sets as a user of the session's model would, cutting off what it would not read.

        Raises `DataError` for damaged sets.
        """
        self.texts = list(texts)
        self.sets: tuple[RetrievalSet, ...] = bundled_retrieval_sets() if self.texts else ()
        self._packed: dict[tuple[str, ...], PackedTokens] = {}
        embedder = session.checkpoint.embedder
        assert embedder is not None
        for each in self.sets:
            for kind, given, names in (("queries", each.queries, _QUERY), ("documents", each.documents, _DOCUMENT)):
                if given in self._packed:
                    continue
                tokens, cut = pack_as_used(
                    f"retrieval {kind}",
                    given,
                    session.need_tokenizer(),
                    session.checkpoint.objective,
                    prompt=embedder.prompt_for(*names),
                )
                self._packed[given] = tokens
                if cut:
                    session.ui.note(
                        f"retrieval: {cut} of the {len(given)} {kind} are longer than the model takes and are cut off, "
                        "as wherever it is used"
                    )

    @property
    def all_tokens(self) -> list[PackedTokens]:
        """Everything that each model is run on."""
        return [*self.texts, *self._packed.values()]

    def vectors(self, session: Session, checkpoint: Checkpoint) -> dict[str, TextVectors]:
        """Return a model's vectors by set of texts; those of the retrieval sets are with the first."""
        model, found = session.stream(checkpoint), dict[str, TextVectors]()
        known: dict[tuple[str, ...], Tensor] = {}
        for given, tokens in self._packed.items():
            known[given] = text_vectors(model, tokens, session.settings)
        retrieval = {each.name: RetrievalVectors(known[each.queries], known[each.documents]) for each in self.sets}
        for tokens in self.texts:
            vectors = text_vectors(model, tokens, session.settings)
            found[tokens.name] = TextVectors(vectors, {} if found else retrieval)
        return found

    def quality(self, model: TextVectors, original: TextVectors, seed: int) -> EmbeddingQuality:
        """Return what a model's vectors are worth beside those of the original."""
        sets = [each for each in self.sets if each.name in model.retrieval]
        some, others = (replace(each, texts=_some(each.texts)) for each in (model, original))
        return embedding_quality(some, others, sets, halves(model.dimensions), seed)

    @staticmethod
    def nearness(model: TextVectors, original: TextVectors) -> TaskResult:
        """Return how near a model's vectors are to those of the original."""
        return nearness(model.texts, original.texts)
