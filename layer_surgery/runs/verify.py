"""A result compared with what its `surgery.json` says: whole or damaged, of this original or of an earlier one."""

from pathlib import Path
from typing import Any

from layer_surgery.checkpoint.contents import file_sha256, files_in, listed_files
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import VerifyConfig
from layer_surgery.disk.reading import why
from layer_surgery.errors import CheckpointError, ReportError
from layer_surgery.progress import Progress, no_progress
from layer_surgery.records.reading import ADVICE, REPORT_FILE, read_json, report_file
from layer_surgery.records.surgery import REPORT_SCHEMA_VERSION, FileRecord
from layer_surgery.records.verification import BaseState, Verification


def run_verify(directory: Path, config: VerifyConfig) -> Verification:
    """Compare every file of a result with its hash, and its original, where it can be found, with the one it was.

    Raises `ReportError` for a directory that is no result, or has no list of files; `CheckpointError` for a `base` that
    is no model.
    """
    directory, data, listed = _listed(directory)
    hashed = {name: record for name, record in listed.items() if record.sha256 is not None}
    damaged, missing = _compared(directory, hashed, config.ui.progress)
    base, name = _base(data, config)
    return Verification(
        directory=str(directory),
        files=len(hashed) - len(missing),
        bytes=sum(record.bytes or 0 for name, record in hashed.items() if name not in missing),
        damaged=damaged,
        missing=missing,
        unlisted=sorted(set(files_in(directory)) - {*listed, REPORT_FILE}),
        base=base,
        base_name=name,
    )


def check_whole(directory: Path, progress: Progress = no_progress) -> None:
    """Raise `CheckpointError` unless every file of a result has the hash that its `surgery.json` says.

    Raises `ReportError` for a directory that is no result, or has no list of files.
    """
    directory, _data, listed = _listed(directory)
    hashed = {name: record for name, record in listed.items() if record.sha256 is not None}
    damaged, missing = _compared(directory, hashed, progress)
    if damaged or missing:
        found = [*(f"{name} is not what was written" for name in damaged), *(f"{name} is missing" for name in missing)]
        more = f" and {len(found) - 1} more files are damaged or missing" if found[1:] else ""
        raise CheckpointError(f"{directory} is damaged: {found[0]}{more}; copy it again, or {ADVICE}.")


def _listed(directory: Path) -> tuple[Path, dict[str, Any], dict[str, FileRecord]]:
    """Return the directory of a result, what its `surgery.json` says, and the files that it lists."""
    file = report_file(directory)
    data = read_json(file, REPORT_SCHEMA_VERSION, ADVICE)
    try:
        listed = listed_files(data)
    except ValueError as error:
        raise ReportError(f"{file} is damaged: {error}; {ADVICE}.") from error
    if not listed:
        raise ReportError(f"{file} has no list of files, which releases up to 0.2 did not write; {ADVICE}.")
    return file.parent, data, listed


def _compared(directory: Path, hashed: dict[str, FileRecord], progress: Progress) -> tuple[list[str], list[str]]:
    """Return which files are damaged, and which are missing."""
    damaged, missing = list[str](), list[str]()
    with progress("comparing", len(hashed)) as advance:
        for name, record in sorted(hashed.items()):
            path = directory / name
            try:
                if path.stat().st_size != record.bytes or file_sha256(path) != record.sha256:
                    damaged.append(name)
            except FileNotFoundError:
                missing.append(name)
            except OSError as error:
                damaged.append(f"{name} ({why(error)})")
            advance()
    return damaged, missing


def _base(data: dict[str, Any], config: VerifyConfig) -> tuple[BaseState, str]:
    """Return how the original is now, and its name; it is looked for where it was, unless the user says where."""
    record = data.get("base_model")
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        if config.base is not None:
            raise ReportError(f"{config.base} cannot be compared: {REPORT_FILE} does not say what the result is from.")
        return "not known", ""
    name = config.base or str(record.get("name"))
    if config.base is None and not Path(name).is_dir():
        return "not found", name
    try:
        checkpoint = open_checkpoint(name, trust_remote_code=config.trust_remote_code)
    except CheckpointError:
        if config.base is not None:
            raise
        return "not found", name  # something else has its name now
    with config.ui.progress("hashing the original", len(checkpoint.source.specs)) as advance:
        return ("same" if checkpoint.sha256(advance) == record["sha256"] else "changed"), name
