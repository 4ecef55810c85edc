"""Text that users and models have written, made harmless before it goes to a page, a figure or a card."""

import re
import unicodedata

#: Characters that change the order of what stands around them. On the page each text is isolated; figures cannot.
_DIRECTIONS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C])


def printable(text: str) -> str:
    """Return text without what HTML cannot hold: control characters become visible pictures, lone surrogates U+FFFD."""
    return "".join(_printable(character) for character in text)


def one_line(text: str) -> str:
    """Return text as one line for a terminal: nothing in it moves the cursor, changes colours or begins a line."""
    return printable(text.translate(_DIRECTIONS)).replace("\n", "\u240a").replace("\t", " ")


def plain_label(text: str, longest: int = 34) -> str:
    """Return a name on one line for a figure: as above, without marks of direction, cut in the middle if too long."""
    line = " ".join(printable(text.translate(_DIRECTIONS)).split())
    if len(line) <= longest:
        return line
    head = (longest - 1) // 2
    return f"{line[:head]}…{line[len(line) - (longest - 1 - head) :]}"


def quiet(text: str) -> str:
    """Return text without blank lines around it, and with at most one between its lines."""
    return re.sub(r"\n[ \t]*(?:\n[ \t]*)+\n?", "\n\n", text.strip())


def breakable(text: str) -> str:
    """Return `value [low, high]` with a line break before the bracket, for narrow screens, and none within it."""
    return text.replace(" [", "\n[").replace(", ", ",\u00a0")


def code_span(text: str) -> str:
    """Return text as code within a line of Markdown, whatever it holds; also within a table."""
    line = " ".join(printable(text).split()) or " "
    fence = "`" * (_longest_run(line) + 1)
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")


def markdown(text: str) -> str:
    """Return text as plain text on one line of Markdown, also within a table."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\\\`*_\[\]<>|#~&])", r"\\\1", line)


def code_block(text: str, language: str = "") -> str:
    """Return text as a block of code in Markdown."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def _printable(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # other control characters, surrogates, and the code points that are never characters
    if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
        return "\ufffd"
    return "\ufffd" if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF else character


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
