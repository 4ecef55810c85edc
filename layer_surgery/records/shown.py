"""How records that a user gets show themselves; what draws them is registered by `reporting/notebook.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol


class Drawing(NamedTuple):
    """How records of one class are shown."""

    html: Callable[[Any], str]  #: For notebooks.
    text: Callable[[Any], str]  #: For `print`.


class Printer(Protocol):
    """The part of IPython's printer that is used."""

    def text(self, text: str) -> None: ...


class Shown:
    """A record that a notebook shows with tables and figures, and `print` as tables."""

    _drawings: ClassVar[dict[type, Drawing]] = {}

    @classmethod
    def shown_by(cls, drawing: Drawing) -> None:
        """Register how records of this class are shown."""
        Shown._drawings[cls] = drawing

    def __str__(self) -> str:
        drawing = Shown._drawings.get(type(self))
        return repr(self) if drawing is None else drawing.text(self)

    def _repr_html_(self) -> str | None:
        drawing = Shown._drawings.get(type(self))
        return None if drawing is None else drawing.html(self)

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:
        """In IPython at a terminal: the same as `print`."""
        printer.text(str(self))
