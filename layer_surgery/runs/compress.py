"""The main job, top to bottom: open, calibrate, score, plan, operate, evaluate, save."""

from contextlib import ExitStack

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import CompressConfig
from layer_surgery.errors import PlanError
from layer_surgery.journal import check_journal, open_journal
from layer_surgery.records import LayerScores, SurgeryPlan, SurgeryReport
from layer_surgery.runs.bench import open_bench
from layer_surgery.runs.dimensions import with_dimensions
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.healing import Healed, PreparedHealing, heal
from layer_surgery.runs.identity import run_identity
from layer_surgery.runs.opening import check_options, open_compression
from layer_surgery.runs.outcome import evaluate_result, measured
from layer_surgery.runs.output import check_output_given, save_result, write_report
from layer_surgery.runs.planning import checked
from layer_surgery.runs.provenance import (
    base_model_record,
    checkpoint_hash,
    described_tokens,
    run_provenance,
)
from layer_surgery.runs.session import Model, Session
from layer_surgery.runs.stages import stages_of_compression


def run_compress(model: Model, config: CompressConfig, *, known_scores: LayerScores | None = None) -> SurgeryReport:
    """Compress a model. Everything that can be refused is refused before any work is done.

    `known_scores` are what the scorer has given for the same options before; it is then not asked again.
    """
    config = checked(config)
    check_output_given(config)
    check_options(config)
    parallel.from_first(lambda: check_journal(config.resume, config.output))
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(config.resume, config.ui.note))
        opened = open_compression(model, config, stack)
        session, planning, staging = opened.session, opened.planning, opened.staging
        tokens, evaluator, healing = opened.tokens, opened.evaluator, opened.healing
        original = session.checkpoint
        sha256 = checkpoint_hash(session)
        _check_plan_is_for(config, sha256)
        journal.begin(run_identity(session, config, sha256, tokens, opened.general))
        scored = planning.chooses and known_scores is None
        session.ui.plan(
            stages_of_compression(
                planning, evaluator.texts, tokens, scored=scored, saved=staging is not None, healed=healing is not None
            )
        )
        with session.stage("evaluate_before"):
            evaluator.measure("before", original)
        with open_bench(
            session,
            tokens,
            config,
            part=config.remove,
            maps=planning.needs_maps,
            general=opened.general,
            base_sha256=sha256,
            journal=journal,
        ) as bench:
            scores = bench.scores(**planning.ranking) if scored else known_scores
            result = bench.operate(planning.plan(scores, sha256, bench.first_removable), **planning.surgery)
        checkpoint = with_dimensions(session, result.checkpoint, config, config.dimensions)
        healed = None
        if healing is not None:
            healed = _healed(healing, session, evaluator, checkpoint, result.plan, sha256)
            checkpoint = healed.checkpoint
        compared = evaluate_result(session, evaluator, checkpoint, healed=healed is not None)
        files = save_result(session, checkpoint, staging, original, config) if staging is not None else {}
        report = SurgeryReport(
            base_model=base_model_record(original, sha256),
            plan=result.plan,
            scores=scores,
            refit=result.refitted,
            expected=result.expected,
            spectra=result.spectra,
            calibration=described_tokens(tokens),
            provenance=run_provenance(session, config),
            files=files,
            healing=healed.record if healed is not None else None,
            output=str(config.output) if staging is not None else None,
            **compared,
            **measured(session, evaluator),
        )
        return report if staging is None else write_report(report, staging, config)


def _healed(
    healing: PreparedHealing,
    session: Session,
    evaluator: Evaluator,
    checkpoint: Checkpoint,
    plan: SurgeryPlan,
    sha256: str,
) -> Healed:
    """Measure what the surgery gave, and heal it."""
    with session.stage("evaluate_unhealed"):
        evaluator.measure("unhealed", checkpoint)
    return heal(healing, session=session, teacher=session, teacher_sha256=sha256, student=checkpoint, plan=plan)


def _check_plan_is_for(config: CompressConfig, sha256: str) -> None:
    if config.plan is not None and config.plan.plan.base_sha256 not in ("", sha256):
        raise PlanError(
            f"{config.plan.name} was made for another checkpoint (its base_sha256 begins "
            f"{config.plan.plan.base_sha256[:12]}, this one's {sha256[:12]}); to apply it all the same, clear "
            "base_sha256 in the plan."
        )
