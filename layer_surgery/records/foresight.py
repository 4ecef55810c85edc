"""What a run will take, as `--dry-run` says it before any pass."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageForesight:
    """What one stage is expected to take."""

    name: str
    title: str
    seconds: float | None  #: None where it cannot be told before.
    memory_bytes: int  #: Peak resident memory of the process, or of the device, while it works.
    parts: dict[str, int] = field(default_factory=dict)  #: What the memory is for, in bytes; adds up to it.


@dataclass(frozen=True, kw_only=True)
class KeptFiles:
    """What is kept in a folder that the user names."""

    option: str  #: That names it.
    bytes: int
    free_bytes: int  #: On its disk.


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """What a run is expected to take on this machine."""

    model: str
    device: str
    dtype: str  #: Of computation.
    stages: list[StageForesight]
    memory_available_bytes: int | None
    """What the process may take in all: --memory-limit, else what it has and what is free; None if not known."""
    output_bytes: int  #: Of the result's tensors.
    output_free_bytes: int  #: On the disk of the output.
    scratch_bytes: int  #: Of scratch files at most.
    scratch_free_bytes: int
    kept: list[KeptFiles] = field(default_factory=list)  #: Beside the result, where the user asks for it.
    probed: dict[str, float] = field(default_factory=dict)  #: Seconds that the probe has measured, by what it did.
    left_out: list[str] = field(default_factory=list)  #: What the seconds do not hold.

    @property
    def seconds(self) -> float:
        """Seconds of all stages that are known."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Peak of all stages."""
        return max((stage.memory_bytes for stage in self.stages), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON, with the totals."""
        return {**asdict(self), "seconds": round(self.seconds, 3), "memory_bytes": self.memory_bytes}
