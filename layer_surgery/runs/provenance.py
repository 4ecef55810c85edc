"""Records of where the numbers of a run are from: its model, its data, and what computed them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.heads import CAUSAL_LM
from layer_surgery.checkpoint.origin import origin
from layer_surgery.config import RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError
from layer_surgery.machine import provenance
from layer_surgery.records import SurgeryReport
from layer_surgery.records.provenance import portable
from layer_surgery.runs.session import Session


def report_dict(report: SurgeryReport) -> dict[str, Any]:
    """Return what `surgery.json` holds."""
    return {name: value for name, value in report.to_dict().items() if name != "output"}


def checkpoint_hash(session: Session) -> str:
    """Return the hash of the session's checkpoint."""
    tensors = len(session.checkpoint.source.specs)
    with session.clock.stage("hash"), session.ui.progress("hashing", tensors) as advance:
        # Once on every machine: they may not read the same files.
        sha256 = session.checkpoint.sha256(advance) if parallel.group().local_rank == 0 else None
        found = [each for each in parallel.gather(sha256) if each is not None]
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the machines have different checkpoints under {session.checkpoint.name} (their hashes begin "
            f"{' and '.join(sorted({each[:12] for each in found}))}); give all the same one."
        )
    return str(found[0])


def base_model_record(checkpoint: Checkpoint, sha256: str) -> dict[str, Any]:
    """Return what a record says about the original."""
    head = {"head": checkpoint.head.kind, "loss_unit": checkpoint.objective.unit}
    return {
        "name": _name(checkpoint),
        "model_type": checkpoint.architecture.model_type,
        "sha256": sha256,
        "layers": checkpoint.layer_count,
        "parameters": checkpoint.parameters,
        "size_bytes": checkpoint.size_bytes,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        **({} if checkpoint.head is CAUSAL_LM else head),
        **origin(checkpoint.directory, str(getattr(checkpoint.config, "_name_or_path", ""))),
    }


def _name(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's name as the user gave it; of `.` and `..`, which say nothing later, the directory's."""
    if checkpoint.directory is not None and Path(checkpoint.name).name in ("", ".."):
        return checkpoint.directory.resolve().name or checkpoint.name
    return checkpoint.name


def run_provenance(session: Session, config: RuntimeConfig, **more: Any) -> dict[str, Any]:
    """Return versions, hardware, seed, dtype, all settings (`more` among them) and the command of a run."""
    return provenance(session.device) | {
        "command": config.command,
        "seed": config.seed,
        "compute_dtype": str(session.dtype).removeprefix("torch."),
        "config": portable(more | config.described()),
    }


def described_tokens(tokens: PackedTokens | None) -> dict[str, Any] | None:
    """Return what a record says about calibration data: names, hash and sizes."""
    if tokens is None:
        return None
    described = {k: v for k, v in asdict(tokens).items() if isinstance(v, str | int)}
    return described | {
        "sequences": tokens.sequences,
        "sequence_length": tokens.sequence_length,
        "tokens": int(tokens.valid.sum()),
        "predicted_tokens": tokens.predicted_tokens,
        "sources": [asdict(source) for source in tokens.sources],
    }
