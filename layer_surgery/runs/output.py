"""The output of a run that saves a result: asked for, staged, and given its record, page and card."""

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from layer_surgery.checkpoint.save import check_not_same, check_output, staged_directory, write_json
from layer_surgery.config.commands import OutputConfig
from layer_surgery.errors import OutputError, describe
from layer_surgery.records import StageFailure, SurgeryReport
from layer_surgery.records.reading import REPORT_FILE
from layer_surgery.reporting.publish import write_page_and_card
from layer_surgery.runs.provenance import report_dict
from layer_surgery.runs.session import Model

_LOG = logging.getLogger(__name__)


def check_output_given(config: OutputConfig) -> None:
    """Raise `OutputError` if there is neither an output nor a dry run."""
    if config.output is None and not config.dry_run:
        raise OutputError("give --output (a directory for the compressed model), or --dry-run.")


def open_output(model: Model, config: OutputConfig, stack: ExitStack) -> Path | None:
    """Return a staging directory that becomes the output when `stack` is left; None for a dry run."""
    if config.output is None:
        return None
    check_not_same(model, config.output)
    check_output(config.output, overwrite=config.overwrite)
    return None if config.dry_run else stack.enter_context(staged_directory(config.output, overwrite=config.overwrite))


def write_report(report: SurgeryReport, directory: Path, config: OutputConfig) -> SurgeryReport:
    """Write `surgery.json`, page and card; if these fail, that is recorded and the model is not lost."""
    write_json(directory / REPORT_FILE, report_dict(report))
    assert config.output is not None
    try:
        write_page_and_card(directory, report, config.output.name)
    except Exception as error:
        _LOG.debug("the report page failed", exc_info=True)
        failure = StageFailure(stage="report page", error=describe(error))
        report = replace(report, failures=[*report.failures, failure])
        write_json(directory / REPORT_FILE, report_dict(report))
    return report
