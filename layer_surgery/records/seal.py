"""A text that says in its last line, by a hash, whether anybody has changed it since it was made."""

import hashlib
import re

_SEAL = re.compile(r"\n<!-- layer-surgery: SHA-256 of all above ([0-9a-f]{64}) -->\n\Z")


def sealed(text: str) -> str:
    """Return Markdown or HTML with a comment behind it that holds the hash of the text."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- layer-surgery: SHA-256 of all above {_sha256(text)} -->\n"


def is_unedited(text: str) -> bool:
    """Return whether a text is one that `sealed` has made and nobody has changed."""
    match = _SEAL.search(text)
    return match is not None and match[1] == _sha256(text[: match.start()])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
