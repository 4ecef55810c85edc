"""Figures as inline SVG: drawn by matplotlib, then made fit for a page (colours from its style sheet, unique ids)."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from layer_surgery.reporting.text import plain_label

#: Colours by their use, as they are on white and on a dark page. Series are those of Okabe & Ito (Color Universal
#: Design, 2008), which colour-blind readers can tell apart; the dark column has their lighter ones.
COLOURS = {
    "ink": ("#1b1e23", "#e7e9ec"),
    "muted": ("#5a616b", "#a3abb6"),
    "rule": ("#d7dbe0", "#383e47"),
    "card": ("#fdfdfe", "#1c2026"),
    "blue": ("#0072b2", "#56b4e9"),
    "vermillion": ("#d55e00", "#f0823a"),
    "orange": ("#e69f00", "#f0bc4d"),
    "green": ("#009e73", "#33c79b"),
    "purple": ("#cc79a7", "#dd9fc1"),
}
#: The colours on white: figures are drawn with them, and each is then replaced by a variable of the style sheet.
INK, MUTED, RULE, CARD, BLUE, VERMILLION, ORANGE, GREEN, PURPLE = (light for light, _ in COLOURS.values())
#: Colour and marker of each series.
SERIES = [(BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (MUTED, "P")]
#: Width of every figure in points: legible on a phone, and two stand side by side on a desk.
WIDTH = 400

_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # a name may hold a dollar sign
    **dict.fromkeys(("font.size", "axes.titlesize"), 11),
    "axes.labelsize": 10.5,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10),
    **dict.fromkeys(("text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 1.2,
    "hatch.color": CARD,
    "lines.linewidth": 1.6,
    "axes.unicode_minus": True,
}


class Plot(NamedTuple):
    """A figure of a page."""

    svg: Markup
    title: str
    caption: str  #: Explanations without which it cannot be read.


def draw(
    key: str, title: str, alternative: str, caption: str, *, height: float, paint: Callable[[Figure], None]
) -> Plot:
    """Return what `paint` draws on an empty figure of `WIDTH` x `height` points.

    The same input gives the same bytes, whatever matplotlib settings the user has.

    Args:
        key: a word that no other figure on the page has; its ids begin with it.
        alternative: the figure in words, for those who do not see it.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks; the reader's font draws them
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": key})
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Plot(Markup(_inline(file.getvalue(), key, title, alternative)), title, caption)


def _inline(svg: str, key: str, title: str, alternative: str) -> str:
    """Return an SVG file as an element of an HTML page: no styles that reach outside, no ids that others may have."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{key}-{name}")
        link = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if link is not None:
            element.set("href", f"#{key}-{link.removeprefix('#')}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{key}-"))
        if "style" in element.attrib:
            style = re.sub(r"font-family:[^;]*;?\s*", "", element.attrib["style"])
            element.set("style", style.replace("url(#", f"url(#{key}-"))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
    _describe(root, key, title, alternative)
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLES.get(match[0], match[0]), text)


def _describe(root: ElementTree.Element, key: str, title: str, alternative: str) -> None:
    """Give the figure a name and a description, and take from it all attributes but its measures."""
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "role": "img", "aria-labelledby": f"{key}-title {key}-description"}
    root.set("stroke-linejoin", "round")
    for position, (tag, name, text) in enumerate((("title", "title", title), ("desc", "description", alternative))):
        element = ElementTree.Element(tag, {"id": f"{key}-{name}"})
        element.text = plain_label(text, 2000)
        root.insert(position, element)
