"""The process that foresees: what it takes anyway, what it may take, and what has been found of all stages."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from layer_surgery.devices import available_memory_bytes, frees_to_system, used_memory_bytes
from layer_surgery.machine import release_freed_memory
from layer_surgery.records.foresight import Foresight, KeptFiles, StageForesight
from layer_surgery.runs.foresight import memory
from layer_surgery.runs.foresight.fits import Place, check_disk, existing
from layer_surgery.runs.foresight.probe import Rates
from layer_surgery.runs.foresight.sizes import Sizes
from layer_surgery.runs.session import Session


@dataclass(frozen=True)
class Process:
    """A session, and the bytes that its process has before any stage."""

    session: Session
    base: int

    @classmethod
    def now(cls, session: Session) -> Self:
        """Return the process as it is."""
        gc.collect()
        release_freed_memory()
        return cls(session, used_memory_bytes(session.device))

    @property
    def may_take(self) -> int | None:
        """Bytes that the process may take in all; None where that is not known."""
        free, limit = available_memory_bytes(self.session.device), self.session.runtime.memory_limit
        return limit if limit is not None else None if free is None else free + self.base

    def stage(self, name: str, title: str, taken: float | None, working: memory.Parts, sizes: Sizes) -> StageForesight:
        """Return a stage of so many seconds with the memory of the process beside its own."""
        kept = memory.kept_by_allocator(working, sizes, given_back=frees_to_system(self.session.device))
        parts = {"the process": self.base} | working | kept
        return StageForesight(name=name, title=title, seconds=taken, memory_bytes=sum(parts.values()), parts=parts)

    def found(
        self,
        stages: list[StageForesight],
        *,
        output: Path | None,
        output_bytes: int,
        scratch_bytes: int,
        probed: Mapping[str, float],
        left_out: list[str],
        check_memory: Callable[[Foresight, int | None], None],
        advice: str,
        kept: Mapping[str, tuple[Path, int]] | None = None,
    ) -> Foresight:
        """Return the whole; raises `UserError` if it does not fit.

        Args:
            check_memory: is called with the whole and what may be taken.
            advice: what else there is to do where a disk is too small.
            kept: folders of the user's, with what is kept in them, by option.
        """
        session, folders = self.session, kept or {}
        scratch = session.runtime.scratch or (output.parent if output is not None else Path(tempfile.gettempdir()))
        found = Foresight(
            model=session.checkpoint.name,
            device=str(session.device),
            dtype=str(session.dtype).removeprefix("torch."),
            stages=stages,
            memory_available_bytes=self.may_take,
            output_bytes=output_bytes,
            output_free_bytes=_free(output or scratch),
            scratch_bytes=scratch_bytes,
            scratch_free_bytes=_free(scratch),
            kept=[KeptFiles(option=name, bytes=size, free_bytes=_free(path)) for name, (path, size) in folders.items()],
            probed=dict(probed),
            left_out=left_out,
        )
        check_memory(found, found.memory_available_bytes)
        places = [Place("scratch files", scratch, scratch_bytes)]
        places += [Place("the result", output, output_bytes)] if output is not None else []
        places += [Place(f"what {name} keeps", path, size) for name, (path, size) in folders.items()]
        check_disk(places, advice)
        return found


def means(rates: Rates | None) -> dict[str, float]:
    """Return what was measured, for a mean layer."""
    found = dict[str, float]()
    for name, value in (asdict(rates) if rates is not None else {}).items():
        found[name] = value if isinstance(value, float) else sum(value.values()) / max(1, len(value))
    return found


def _free(path: Path) -> int:
    return shutil.disk_usage(existing(path)).free
