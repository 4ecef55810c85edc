"""The section of a page that says where its numbers come from: command, data, versions, hardware, settings."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Everything that the section shows."""

    command: str | None  #: None where it was called from Python.
    sources: list[tuple[str, str]]  #: Calibration data, as from `calibration_sources`.
    facts: list[tuple[str, str]]  #: A term and its description.
    settings: str  #: All of them, as JSON.


def provenance_section(
    base: dict[str, Any], calibration: dict[str, Any] | None, run: dict[str, Any], more: dict[str, Any]
) -> Provenance:
    """Return the section of a run.

    Args:
        base: record of the original.
        calibration: record of the calibration data.
        run: provenance of the run, as its record has it.
        more: further facts, by term; None and "" are left out.
    """
    packages = run.get("packages") or {}
    facts = {
        "original": f"{base['name']} ({base.get('model_type', '')}, {base.get('dtype', '')})",
        "its SHA-256": base.get("sha256"),
        **more,
        "made": run.get("time"),
        "seed": run.get("seed"),
        "computed in": run.get("compute_dtype"),
        "device": run.get("device"),
        "processor": _processor(run),
        "platform": run.get("platform"),
        "python": run.get("python"),
        "packages": ", ".join(f"{package} {version}" for package, version in packages.items() if version),
        "SHA-256 of the code": run.get("code_sha256"),
        "SHA-256 of the calibration tokens": (calibration or {}).get("sha256"),
    }
    return Provenance(
        command=run.get("command"),
        sources=calibration_sources(calibration),
        facts=[(term, str(value)) for term, value in facts.items() if value not in (None, "")],
        settings=json.dumps(run.get("config", {}), indent=2, ensure_ascii=False),
    )


def calibration_sources(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the names of the calibration data, each with its size in words."""
    calibration = calibration or {}
    found = [
        (
            str(source.get("name", "")),
            f"{source.get('sequences', 0):,} sequences, {source.get('tokens', 0):,} tokens, of which "
            f"{source.get('predicted_tokens', 0):,} carry loss",
        )
        for source in calibration.get("sources", [])
    ]
    if calibration and not found:
        found = [(str(calibration.get("name", "")), f"{calibration.get('tokens', 0):,} tokens")]
    return found


def _processor(run: dict[str, Any]) -> str | None:
    threads = run.get("cpu_threads")
    return f"{run['processor']}, {threads} thread{'s' * (threads != 1)}" if run.get("processor") else None
