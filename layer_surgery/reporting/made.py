"""What a page says of how its numbers were made: command, data, versions, hardware, settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Made:
    """What the section `How it was made` shows."""

    command: str | None
    sources: list[tuple[str, str]]
    """Calibration data: a name, and what is known of it."""
    facts: list[tuple[str, str]]
    """A term and its description."""
    settings: str
    """All of them, as JSON."""


def how_it_was_made(
    base: dict[str, Any], calibration: dict[str, Any] | None, made: dict[str, Any], more: dict[str, Any]
) -> Made:
    """Return the section of a run.

    Args:
        base: record of the original.
        calibration: record of the calibration data.
        made: provenance of the run.
        more: further facts, by term; None and "" are left out.
    """
    packages = made.get("packages") or {}
    facts = {
        "original": f"{base['name']} ({base.get('model_type', '')}, {base.get('dtype', '')})",
        "its SHA-256": base.get("sha256"),
        **more,
        "made": made.get("time"),
        "seed": made.get("seed"),
        "computed in": made.get("compute_dtype"),
        "device": made.get("device"),
        "processor": f"{made.get('processor')}, {made.get('cpu_threads')} threads" if made.get("processor") else None,
        "platform": made.get("platform"),
        "python": made.get("python"),
        "packages": ", ".join(f"{package} {version}" for package, version in packages.items() if version),
        "SHA-256 of the calibration tokens": (calibration or {}).get("sha256"),
    }
    return Made(
        command=made.get("command"),
        sources=calibration_sources(calibration),
        facts=[(term, str(value)) for term, value in facts.items() if value not in (None, "")],
        settings=json.dumps(made.get("config", {}), indent=2, ensure_ascii=False),
    )


def calibration_sources(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what the calibration data were, as pairs of a name and what is known of it."""
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
