"""Size and perplexities of one model by itself. Shared by the scripts here."""

from __future__ import annotations

from dataclasses import replace

from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.config import EvaluationConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.evaluation.perplexity import summarise, window_losses
from layer_surgery.records import EvaluationResult
from layer_surgery.runs.evaluator import size_and_costs
from layer_surgery.runs.session import Session


def size_and_perplexity(session: Session, checkpoint: Checkpoint, texts: list[PackedTokens]) -> EvaluationResult:
    """Measure a model on each text; what fails is raised."""
    context = texts[0].sequence_length if texts else EvaluationConfig.sequence_length
    result = size_and_costs(checkpoint, context)
    if not texts:
        return result
    model = session.stream(checkpoint)
    return replace(result, perplexity={t.name: summarise(window_losses(model, t, session.settings), t) for t in texts})
