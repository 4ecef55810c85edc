"""Composes a sweep: open and calibrate once, evaluate the original once, then operate and evaluate point by point."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Self

import attrs

from layer_surgery import parallel
from layer_surgery.checkpoint.contents import PAGE_FILES
from layer_surgery.checkpoint.heads import CAUSAL_LM
from layer_surgery.checkpoint.output import check_not_same, writing
from layer_surgery.config import SweepConfig
from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.folders import check_folder
from layer_surgery.errors import LayerSurgeryError, PlanError
from layer_surgery.evaluation.task_names import check_task_names
from layer_surgery.records import StageFailure, SurgeryPlan
from layer_surgery.records.reading import REPORT_FILE, read_sweep
from layer_surgery.records.sweep import SweepBest, SweepPoint, SweepReport, SweepSettings
from layer_surgery.reporting.publish import write_sweep_page
from layer_surgery.runs.bench import general_text, open_bench
from layer_surgery.runs.compress import run_compress
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.planning import Planning
from layer_surgery.runs.provenance import base_model_record, checkpoint_hash, described_tokens, run_provenance
from layer_surgery.runs.session import Model, Session, check_sources, open_session
from layer_surgery.runs.stages import stages_of_sweep
from layer_surgery.runs.sweep.condition import Condition, find_best, parse_condition
from layer_surgery.runs.sweep.grid import compress_config, grid, in_order, same_surgery
from layer_surgery.runs.sweep.identity import check_same, sweep_identity
from layer_surgery.runs.sweep.measuring import Measuring
from layer_surgery.runs.sweep.pareto import with_fronts
from layer_surgery.runs.sweep.sharing import Shares, different, need_statistics, share_out
from layer_surgery.runs.sweep.state import (
    BEST_FOLDER,
    check_best,
    check_sweep_directory,
    clear_sweep,
    sweep_directory,
    write_sweep,
)
from layer_surgery.walk.walk import Walk

#: Behind what is said of a sweep in the output that cannot be gone on with.
ADVICE = "give another --output, or --overwrite to start anew"


def run_sweep(model: Model, config: SweepConfig) -> SweepReport:
    """Measure every point that is not in the output yet; then save the best model, if one is asked for.

    Everything that can be refused is refused before any work is done. What is found is on disk after every point.
    """
    points = grid(config)
    condition = parse_condition(config.best, config) if config.best is not None else None
    check_folder(config.cache, "--cache")
    check_sources(config.text_column, calibration=config.calibration, evaluation=config.eval_data)
    check_task_names(config, bundled_tasks)
    if condition is not None or config.overwrite:
        check_not_same(model, config.directory / BEST_FOLDER)
        check_best(config.directory)
    check_sweep_directory(config.directory)
    with parallel.shared_folder(sweep_directory(config.directory)) as directory:
        known = None if config.overwrite else read_sweep(directory, ADVICE)
        with open_session(model, config, directory) as session:
            if condition is not None and session.checkpoint.head is not CAUSAL_LM:
                raise PlanError(
                    f"--best bounds what is measured of causal language models, but {session.checkpoint.name} is a "
                    f"{session.checkpoint.head.words}; leave it out and choose from the table."
                )
            report = _Sweep.begin(session, config, points, known).finished()
        if condition is not None:
            report = _with_best(model, config, condition, report)
        elif report.best is not None:
            report = _with_old_best(config, report.best, report)
        if parallel.is_first():
            with writing(directory):
                write_sweep_page(directory, report)
    return report


@dataclass
class _Sweep:
    """A sweep that is under way: what is asked for, and what is found so far."""

    session: Session
    config: SweepConfig
    points: list[SweepSettings]
    general: PackedTokens | None
    tokens: PackedTokens
    texts: list[PackedTokens]
    report: SweepReport

    @classmethod
    def begin(
        cls, session: Session, config: SweepConfig, points: list[SweepSettings], known: SweepReport | None
    ) -> Self:
        """Make every check that there is, and begin with what is known already."""
        without_texts = attrs.evolve(config, continuations=0, prompts=())
        plannings = [Planning(compress_config(config, point), session.checkpoint, session.device) for point in points]
        tokens = session.calibration_tokens(config)
        for planning in plannings:
            planning.check_tokens(tokens)
        refitted = any(planning.refit_scope is not None for planning in plannings)
        general = general_text(session, tokens, config.refit_general) if refitted else None
        texts = session.evaluation_tokens(config)
        sha256 = checkpoint_hash(session)
        identity = sweep_identity(session, config, sha256, tokens, texts)
        if known is not None:
            check_same(config.directory, known.identity, identity)
            names = [text["name"] for text in known.evaluation]
            texts = [replace(text, name=name) for text, name in zip(texts, names, strict=True)]
        report = SweepReport(
            identity=identity,
            base_model=base_model_record(session.checkpoint, sha256),
            calibration=described_tokens(tokens),
            evaluation=[described_tokens(text) or {} for text in texts],
            original=known.original if known else None,
            failures=known.failures if known else [],
            # Those that failed are tried again if they are still asked for.
            points=[point for point in known.points if point.status == "done"] if known else [],
            best=known.best if known else None,
            provenance=run_provenance(session, config),
        )
        return cls(session, without_texts, points, general, tokens, texts, report)

    def finished(self) -> SweepReport:
        """Measure all points that are missing or have failed, and write after each what there is."""
        missing = [point for point in self.points if point not in self._done()]
        with ExitStack() as stack:
            evaluator = None
            if missing or self.report.original is None or self.report.failures:
                # It makes its own checks, before anything is written.
                evaluator = Evaluator(self.session, self.config, self.texts, baseline=self.session)
                stack.enter_context(evaluator)
            if self.config.overwrite:
                clear_sweep(self.config.directory)
            write_sweep(self.config.directory, self.report)
            if evaluator is not None:
                self._measure(missing, evaluator)
            else:
                self.session.ui.note(f"all {len(self.points)} points are in {self.config.directory} already")
        return self.report

    def _measure(self, missing: Sequence[SweepSettings], evaluator: Evaluator) -> None:
        session, config, count = self.session, self.config, len(self.points)
        session.ui.note(
            f"{count} point{'s' * (count > 1)}, {count - len(missing)} of them known; each is kept in "
            f"{config.directory} when it is done, and the same command goes on from there"
        )
        session.ui.plan(stages_of_sweep(len(missing), evaluator.texts))
        apart = share_out(missing, config)
        with session.stage("evaluate_before"), parallel.alone() if apart else nullcontext():
            evaluator.measure("before", session.checkpoint)
        failures = list(evaluator.failures)
        self._write(replace(self.report, original=evaluator.result("before"), failures=failures))
        sha256 = self.report.base_model["sha256"]
        with open_bench(
            session,
            self.tokens,
            config,
            part=config.remove,
            maps=config.bypasses,
            general=self.general,
            base_sha256=sha256,
        ) as bench:
            if not apart:
                self._measure_together(Measuring(bench, evaluator, sha256), missing)
            elif need_statistics(missing):
                bench.statistics.prepare(bench.walk)
        if apart:  # the walk that all have shared is closed, with its boundaries
            with ExitStack() as stack:
                with parallel.alone():
                    walk = stack.enter_context(Walk(bench.model, self.tokens, session.settings))
                self._measure_apart(Measuring(replace(bench, walk=walk), evaluator, sha256), missing)

    def _measure_together(self, measuring: Measuring, missing: Sequence[SweepSettings]) -> None:
        """Measure points one after another, each by all processes."""
        session = self.session
        for number, settings in enumerate(missing, start=1):
            session.ui.note(f"point {number} of {len(missing)}: {settings.name}")
            point = self._copied(settings)
            if point is None:
                with session.ui.stage(f"point {number}"):
                    point = measuring.point(compress_config(self.config, settings), settings)
                session.ui.note(_outcome(point))
            self._add([point])

    def _measure_apart(self, measuring: Measuring, missing: Sequence[SweepSettings]) -> None:
        """Measure points shared out over the processes; those that give the same model as another are copied."""
        session, left = self.session, list(missing)

        def measured(settings: SweepSettings) -> SweepPoint:
            number = missing.index(settings) + 1
            session.ui.note(f"point {number} of {len(missing)}: {settings.name}")
            with session.ui.stage(f"point {number}"):
                point = measuring.point(compress_config(self.config, settings), settings)
            session.ui.note(_outcome(point))
            return point

        while left:
            self._add([point for settings in left if (point := self._copied(settings)) is not None])
            if not (left := [settings for settings in left if settings not in self._done()]):
                break
            shares = Shares(session.new_scratch("points"), different(left))
            for _ in shares.measure(measured):
                self._add(shares.found())
            self._add(shares.found())
            left = [settings for settings in left if settings not in shares.points]

    def _add(self, points: Sequence[SweepPoint]) -> None:
        """Write down points in the place of earlier ones with the same settings."""
        settings = {point.settings for point in points}
        others = [each for each in self.report.points if each.settings not in settings]
        self._write(replace(self.report, points=[*others, *points]))

    def _write(self, report: SweepReport) -> None:
        by_settings = {point.settings: point for point in report.points}
        points = [by_settings[settings] for settings in in_order(by_settings)]
        self.report = replace(report, points=with_fronts(points))
        write_sweep(self.config.directory, self.report)

    def _done(self) -> dict[SweepSettings, SweepPoint]:
        return {point.settings: point for point in self.report.points if point.status == "done"}

    def _copied(self, settings: SweepSettings) -> SweepPoint | None:
        """Return the results of a point that gives the same model, under these settings."""
        for other, point in self._done().items():
            if same_surgery(other) == same_surgery(settings) and point.plan is not None:
                self.session.ui.note(f"  the same model as {other.name}, which is measured")
                plan = replace(point.plan, method=settings.method)
                return replace(point, method=settings.method, plan=plan, seconds=0.0)
        return None


def _outcome(point: SweepPoint) -> str:
    if point.status == "failed":
        return f"  failed: {point.error}"
    quality = "" if point.perplexity_ratio is None else f", perplexity x {point.perplexity_ratio:.4g}"
    quality = quality if point.loss_ratio is None else f", loss x {point.loss_ratio:.4g}"
    return f"  {point.parameters:,} parameters{quality}, {point.seconds:.1f} s"


def _with_best(model: Model, config: SweepConfig, condition: Condition, report: SweepReport) -> SweepReport:
    """Save the best model, unless it is there already, and write down which it is."""
    best, failed = find_best(condition, report.points), list[StageFailure]()
    if best.point is not None:
        point = next(point for point in report.points if point.settings == best.point)
        if not _is_saved(config, report, point):
            config.ui.note(f"saving the smallest model with {condition.text}: {point.settings.name}")
            failed = _save(model, config, point)
        best = replace(best, output=BEST_FOLDER)
    report = replace(report, best=best)
    write_sweep(config.directory, report)
    if failed:
        said = "; ".join(f"{failure.stage} failed: {failure.error}" for failure in failed)
        raise LayerSurgeryError(f"the best model is saved, but {said}; the same command saves it again.")
    return report


def _with_old_best(config: SweepConfig, best: SweepBest, report: SweepReport) -> SweepReport:
    """Forget the best of an earlier run if points that have come since change the answer."""
    found = find_best(parse_condition(best.condition, config), report.points)
    if (found.point, found.nearest) == (best.point, best.nearest):
        return report
    config.ui.note(
        f"with the new points the answer to --best '{best.condition}' is another; give it again to save that model"
    )
    report = replace(report, best=None)
    write_sweep(config.directory, report)
    return report


def _is_saved(config: SweepConfig, report: SweepReport, point: SweepPoint) -> bool:
    """Whether the best model of an earlier run is this point."""
    if report.best is None or report.best.point != point.settings or point.plan is None:
        return False
    saved = config.directory / BEST_FOLDER / REPORT_FILE
    if not all((saved.parent / name).is_file() for name in (REPORT_FILE, *PAGE_FILES)):
        return False
    try:
        return SurgeryPlan.read(saved).layers == point.plan.layers
    except PlanError:
        return False


def _save(model: Model, config: SweepConfig, point: SweepPoint) -> list[StageFailure]:
    """Save the model of a point; return what failed, such as its page."""
    output = config.directory / BEST_FOLDER
    compress = attrs.evolve(compress_config(config, point.settings), output=output, no_save=False, overwrite=True)
    surgery = run_compress(model, compress, known_scores=point.scores)
    if point.plan is None or surgery.plan.layers != point.plan.layers:
        raise LayerSurgeryError(
            f"what was saved to {output} has other layers or ranks than the point had ({point.settings.name}); did the "
            "machine or a package change since the sweep?"
        )
    return surgery.failures
