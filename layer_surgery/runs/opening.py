"""What a compression begins with: everything that can be refused is refused here, before any work is done."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import attrs

from layer_surgery import parallel
from layer_surgery.checkpoint.save import check_free_space
from layer_surgery.config import CompressConfig
from layer_surgery.config.healing import behind_prefix
from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.folders import check_folder
from layer_surgery.errors import UserError
from layer_surgery.evaluation.task_names import check_task_names
from layer_surgery.runs.bench import general_text
from layer_surgery.runs.dimensions import check_dimensions
from layer_surgery.runs.effects import check_effects
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.healing import prepare_healing
from layer_surgery.runs.healing.prepare import PreparedHealing
from layer_surgery.runs.output import open_output
from layer_surgery.runs.planning import Planning
from layer_surgery.runs.session import Model, Session, check_sources, open_session


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, its data and what there is to measure, for one compression."""

    session: Session
    planning: Planning
    staging: Path | None  #: Where the result is written before it is put in place; None if nothing is.
    tokens: PackedTokens | None  #: For calibration.
    general: PackedTokens | None  #: General text that a refit looks at.
    healing: PreparedHealing | None
    texts: list[PackedTokens]  #: For perplexity and distance.
    evaluator: Evaluator


def check_options(config: CompressConfig) -> None:
    """Raise `UserError` for what is wrong whatever the checkpoint is. The options have been through `checked`."""
    check_effects(config)
    check_folder(config.cache, "--cache")
    check_sources(config.text_column, calibration=config.calibration, evaluation=config.eval_data)
    check_task_names(config, bundled_tasks)


def open_compression(model: Model, config: CompressConfig, stack: ExitStack) -> Opened:
    """Open the output, the model, the data, and what there is to measure, until `stack` is left."""
    staging = open_output(model, config, stack)
    session = stack.enter_context(open_session(model, config, staging.parent if staging else None))
    original = session.checkpoint
    check_dimensions(original, config.dimensions)
    planning = Planning(config, original, session.device)
    if staging is not None:
        needed = planning.trial.parameters * original.dtype.itemsize
        parallel.from_first(lambda: check_free_space(staging, needed))
    tokens, general = None, None
    if planning.needs_data:
        tokens = session.calibration_tokens(config)
        planning.check_tokens(tokens)
        if planning.refit_scope is not None:
            general = general_text(session, tokens, config.refit_general)
    healing = None
    if config.heal is not None:
        option = "--heal-data" if config.heal.data else "--calibration"
        chosen = attrs.evolve(config.heal, data=config.heal.data or config.calibration)
        try:
            healing = prepare_healing(
                session,
                chosen,
                config,
                option,
                fewer_dimensions=config.dimensions is not None,
                parameters=planning.trial.parameters,
            )
        except UserError as error:
            raise behind_prefix(error) from error
    texts = session.evaluation_tokens(config)
    evaluator = stack.enter_context(Evaluator(session, config, texts, baseline=session))
    session.stream(original)  # proves, before anything else is done, that it can be walked over
    return Opened(
        session=session,
        planning=planning,
        staging=staging,
        tokens=tokens,
        general=general,
        healing=healing,
        texts=texts,
        evaluator=evaluator,
    )
