"""Whether a result is what was written, and whether it still belongs to its original."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

BaseState = Literal["same", "changed", "not found", "not known"]
"""The original now, compared with what the result was made from; not known where `surgery.json` does not say that."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The files of a result compared with its `surgery.json`, and its original with the one that it was made from."""

    directory: str
    files: int  #: How many were compared, byte by byte.
    bytes: int  #: Their size.
    damaged: list[str]  #: Files that hold something else than when they were written.
    missing: list[str]
    unlisted: list[str]  #: Files that are not of the result.
    base: BaseState
    base_name: str  #: The original, as it was named.

    @property
    def problems(self) -> list[str]:
        """What is wrong, a phrase for each; files that are not of the result are not."""
        named = {"is damaged": self.damaged, "is missing": self.missing}
        problems = [f"{name} {what}" for what, names in named.items() for name in names]
        if self.base == "changed":
            problems.append(f"the result is stale: {self.base_name} is not what it was made from any more")
        return problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
