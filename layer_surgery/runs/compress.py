"""The main job, top to bottom: open, calibrate, score, plan, operate, evaluate, save."""

from contextlib import ExitStack

import attrs

from layer_surgery import parallel
from layer_surgery.calibration.cache import check_cache
from layer_surgery.checkpoint.save import check_free_space
from layer_surgery.config import CompressConfig
from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.errors import PlanError
from layer_surgery.evaluation.task_names import check_task_names
from layer_surgery.journal import check_journal, open_journal
from layer_surgery.machine import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.records import LayerScores, SurgeryReport
from layer_surgery.runs.bench import general_text, open_bench
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.healing import heal, prepare_healing, unhealed_record
from layer_surgery.runs.identity import run_identity
from layer_surgery.runs.output import check_output_given, open_output, save_result, write_report
from layer_surgery.runs.planning import Planning, checked
from layer_surgery.runs.provenance import (
    base_model_record,
    checkpoint_hash,
    described_tokens,
    run_provenance,
)
from layer_surgery.runs.session import Model, check_sources, open_session
from layer_surgery.runs.stages import stages_of_compression


def run_compress(model: Model, config: CompressConfig, *, known_scores: LayerScores | None = None) -> SurgeryReport:
    """Compress a model. Everything that can be refused is refused before any work is done.

    `known_scores` are what the scorer has given for the same options before; it is then not asked again.
    """
    config = checked(config)
    check_output_given(config)
    check_cache(config.cache)
    check_sources(config.text_column, calibration=config.calibration, evaluation=config.eval_data)
    check_task_names(config, bundled_tasks)
    if config.heal is not None:
        parallel.check_alone("--heal")
    parallel.from_first(lambda: check_journal(config.resume, config.output))
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(config.resume, config.ui.note))
        # Open: the output, the model, the data, and what there is to measure.
        staging = open_output(model, config, stack)
        session = stack.enter_context(open_session(model, config, staging.parent if staging else None))
        original = session.checkpoint
        planning = Planning(config, original, session.device)
        if staging is not None:
            needed = planning.trial.parameters * original.dtype.itemsize
            parallel.from_first(lambda: check_free_space(staging, needed))
        scope, tokens, general = planning.refit_scope, None, None
        if planning.needs_data:
            tokens = session.calibration_tokens(config)
            general = general_text(session, tokens, config.refit_general) if scope is not None else None
        healing = None
        if config.heal is not None:
            option = "--heal-data" if config.heal.data else "--calibration"
            chosen = attrs.evolve(config.heal, data=config.heal.data or config.calibration)
            healing = prepare_healing(session, chosen, config, option)
        texts = session.evaluation_tokens(config)
        evaluator = stack.enter_context(Evaluator(session, config, texts, baseline=session))
        session.stream(original)  # proves, before anything else is done, that it can be walked over
        sha256 = checkpoint_hash(session)
        _check_plan_is_for(config, sha256)
        journal.begin(run_identity(session, config, sha256, tokens, general))
        scored = planning.chooses and known_scores is None
        session.ui.plan(
            stages_of_compression(
                planning, texts, tokens, scored=scored, saved=staging is not None, healed=healing is not None
            )
        )
        # Evaluate the original.
        with session.stage("evaluate_before"):
            evaluator.measure("before", original)
        # Calibrate, score, plan, operate.
        with open_bench(
            session,
            tokens,
            config,
            part=config.remove,
            maps=planning.needs_maps,
            general=general,
            base_sha256=sha256,
            journal=journal,
        ) as bench:
            scores = bench.scores(**planning.ranking) if scored else known_scores
            result = bench.operate(planning.plan(scores, sha256), **planning.surgery)
        # Heal.
        checkpoint, healed, unhealed = result.checkpoint, None, None
        if healing is not None:
            with session.stage("evaluate_unhealed"):
                evaluator.measure("unhealed", checkpoint)
            healed = heal(
                healing, session=session, teacher=session, teacher_sha256=sha256, student=checkpoint, plan=result.plan
            )
            checkpoint = healed.checkpoint
        # Evaluate the result.
        with session.stage("evaluate_after"):
            evaluator.measure("after", checkpoint)
            comparison = evaluator.compare()
            if healed is not None:
                unhealed = unhealed_record(evaluator)
            device_peak = peak_device_memory_bytes(session.device)  # the next measurement begins to count anew
            evaluator.measure_speed()
        # Save.
        files = save_result(session, checkpoint, staging, original, config) if staging is not None else {}
        report = SurgeryReport(
            base_model=base_model_record(original, sha256),
            plan=result.plan,
            scores=scores,
            refit=result.refitted,
            expected=result.expected,
            spectra=result.spectra,
            before=evaluator.result("before"),
            after=evaluator.result("after"),
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=session.clock.rounded,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=device_peak,
            calibration=described_tokens(tokens),
            provenance=run_provenance(session, config),
            files=files,
            healing=healed.record if healed is not None else None,
            unhealed=unhealed,
            output=str(config.output) if staging is not None else None,
        )
        return report if staging is None else write_report(report, staging, config)


def _check_plan_is_for(config: CompressConfig, sha256: str) -> None:
    if config.plan is not None and config.plan.plan.base_sha256 not in ("", sha256):
        raise PlanError(
            f"{config.plan.name} was made for another checkpoint (its base_sha256 begins "
            f"{config.plan.plan.base_sha256[:12]}, this one's {sha256[:12]}); to apply it all the same, clear "
            "base_sha256 in the plan."
        )
