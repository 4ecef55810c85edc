"""Scoring alone: the layers of a model ranked, nothing changed."""

from dataclasses import replace

from layer_surgery.config import ScoreConfig
from layer_surgery.disk.folders import check_folder
from layer_surgery.errors import PlanError
from layer_surgery.progress import Stage
from layer_surgery.records import LayerScores
from layer_surgery.runs.bench import open_bench
from layer_surgery.runs.provenance import run_provenance
from layer_surgery.runs.session import Model, check_sources, open_session
from layer_surgery.scoring import SCORERS


def run_score(model: Model, config: ScoreConfig) -> LayerScores:
    """Rank the decoder layers of a model."""
    entry, target = SCORERS[config.scorer], config.target_layers
    if config.remove != "layer" and not entry.parts:
        raise PlanError(f"--scorer {entry.name} ranks whole layers; leave out --remove {config.remove}.")
    check_folder(config.cache, "--cache")
    check_sources(config.text_column, calibration=config.calibration)
    with open_session(model, config, None) as session:
        layer_count = session.checkpoint.layer_count
        if target is not None and not 1 <= target < layer_count:
            raise PlanError(
                f"--target-layers is {target}; allowed: 1 to {layer_count - 1} (the model has {layer_count} layers)."
            )
        tokens = session.calibration_tokens(config) if entry.needs_data else None
        session.ui.plan([Stage("score", f"ranking the layers ({entry.name})")])
        with open_bench(session, tokens, config, part=config.remove) as bench:
            scores = bench.scores(entry.name, None if target is None else layer_count - target)
        return replace(scores, provenance=run_provenance(session, config, model=session.checkpoint.name))
