"""All that a classifier says: the outputs of its head, whole, as there are few labels.

They are kept in memory and, where the user wants them again, in one safetensors file that is checked when it is read.
Shapes: n items with loss of all sequences, L outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.data.objective import Objective
from layer_surgery.disk.own import remove_dead
from layer_surgery.disk.reading import check_regular
from layer_surgery.disk.writing import staged_file
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.healing.losses.inputs import TeacherLogits
from layer_surgery.healing.outputs import teacher_outputs
from layer_surgery.healing.teacher.cache import STAGING, TeacherIdentity


class TeacherRows:
    """The outputs [n, L] of a teacher, read by sequence."""

    def __init__(self, rows: Tensor, items: Sequence[int], objective: Objective) -> None:
        """Hold the outputs of sequences that have so many items each, one after the other."""
        self.rows, self._objective = rows, objective
        self._places = torch.tensor([0, *items]).cumsum(0)

    def read(self, sequences: Tensor) -> TeacherLogits:
        """Return what the teacher says of all items of some sequences [B] int64, in this order."""
        ranges = [torch.arange(*self._places[number : number + 2].tolist()) for number in sequences.tolist()]
        return teacher_outputs(self.rows[torch.cat(ranges)].to(sequences.device), self._objective)


def captured_rows(outputs: Iterable[Tensor], file: Path | None, identity: TeacherIdentity) -> Tensor:
    """Return outputs that come in pieces [k, L] as one [n, L], and keep them in `file`, if that is given.

    Raises `LayerSurgeryError` if the file cannot be written.
    """
    rows = torch.cat([piece.cpu() for piece in outputs])
    if file is None or not parallel.is_first():
        return rows
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(file, STAGING) as staging:
            save_file({"rows": rows}, staging, {"identity": _text(identity), "sha256": _sha256(rows)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise LayerSurgeryError(
            f"--teacher-cache {file.parent} cannot be written ({reason}); is the disk full?"
        ) from error
    return rows


def stored_rows(
    file: Path, identity: TeacherIdentity, items: Sequence[int], note: Callable[[str], None]
) -> Tensor | None:
    """Return the outputs [n, L] in a file of `captured_rows`; None if there is none, or one that is not usable.

    Args:
        identity: what they are to be of.
        items: [N] how many of them each sequence has.
        note: is told of a file that is damaged.
    """
    remove_dead(file.parent, STAGING)
    if not file.exists():
        return None
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            rows: Tensor = stored.get_tensor("rows")
        whole = about.get("sha256") == _sha256(rows) and about.get("identity") == _text(identity)
    except (OSError, SafetensorError, TypeError):  # numpy has no numbers of some of the types
        whole = False
    if not whole or rows.dim() != 2 or len(rows) != sum(items):
        note(f"warning: {file} is damaged; the teacher is asked again")
        return None
    return rows


def _text(identity: TeacherIdentity) -> str:
    return json.dumps(asdict(identity), sort_keys=True)


def _sha256(rows: Tensor) -> str:
    shape = f"{list(rows.shape)} {rows.dtype}".encode()
    return hashlib.sha256(shape + rows.contiguous().numpy().tobytes()).hexdigest()
