"""The output of a run that saves a result: asked for, staged, written, and given its record, page and card."""

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.contents import list_files
from layer_surgery.checkpoint.output import check_not_same, check_output, staged_directory, writing
from layer_surgery.checkpoint.save import check_saved, save_checkpoint, write_json
from layer_surgery.config import CompressConfig, HealConfig
from layer_surgery.errors import OutputError, describe
from layer_surgery.records import StageFailure, SurgeryReport
from layer_surgery.records.reading import REPORT_FILE
from layer_surgery.records.surgery import FileRecord
from layer_surgery.reporting.publish import write_page_and_card
from layer_surgery.runs.provenance import report_dict
from layer_surgery.runs.session import Model, Session

_LOG = logging.getLogger(__name__)


def check_output_given(config: CompressConfig | HealConfig) -> None:
    """Raise `OutputError` if there is no output and it was not said that nothing is to be written."""
    if config.output is None and not config.no_save:
        raise OutputError(
            "give --output (a directory for the compressed model), or --no-save to write none (compress --dry-run says "
            "what it would take)."
        )


def open_output(model: Model, config: CompressConfig | HealConfig, stack: ExitStack) -> Path | None:
    """Return a staging directory that becomes the output when `stack` is left; None for a dry run.

    With several processes it is the first one's.
    """
    if (output := config.output) is None:
        return None

    def check() -> None:
        check_not_same(model, output)
        if config.no_save:
            check_output(output, overwrite=config.overwrite)

    parallel.from_first(check)
    if config.no_save:
        return None
    staged = staged_directory(output, overwrite=config.overwrite, note=config.ui.note)
    return stack.enter_context(parallel.shared_folder(staged))


def save_result(
    session: Session, checkpoint: Checkpoint, staging: Path, base: Checkpoint, config: CompressConfig | HealConfig
) -> dict[str, FileRecord]:
    """Write a result, with what travels with `base`, into the staging directory; return the files, by their paths."""
    output = config.output
    assert output is not None

    def save() -> dict[str, Any]:
        with writing(output):
            save_checkpoint(checkpoint, staging, base=base, tokenizer=session.tokenizer, progress=session.ui.progress)
            check_saved(staging, checkpoint)
            return {name: asdict(record) for name, record in list_files(staging).items()}

    with session.stage("save"):
        return {name: FileRecord(**record) for name, record in parallel.from_first(save).items()}


def write_report(report: SurgeryReport, directory: Path, config: CompressConfig | HealConfig) -> SurgeryReport:
    """Write `surgery.json`, page and card; if these fail, that is recorded and the model is not lost."""
    assert config.output is not None
    if not parallel.is_first():
        return report
    with writing(config.output):
        write_json(directory / REPORT_FILE, report_dict(report))
        try:
            write_page_and_card(directory, report, config.output.name)
        except Exception as error:
            _LOG.debug("the report page failed", exc_info=True)
            failure = StageFailure(stage="report page", error=describe(error))
            report = replace(report, failures=[*report.failures, failure])
            write_json(directory / REPORT_FILE, report_dict(report))
    return report
