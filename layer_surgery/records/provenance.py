"""Commands and settings as provenance keeps them: without the folders of the machine that they were run on."""

import os.path
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Options and settings that hold free text, which may begin with a slash.
_FREE_TEXT = ("--prompt", "prompts")
_PATH = re.compile(r"/+[^/\s]+(/.*)?", re.DOTALL)


def portable_command(arguments: Sequence[str], root: Path | None = None) -> str:
    """Return a command as one line for a shell, with the absolute paths in it shortened.

    What lies below `root` becomes relative to it; of any other absolute path only the last name stays, with the weight
    that may stand behind it (`PATH:2`). A word, or what follows the `=` of an option, is an absolute path if it begins
    with a slash and its first name has no white space, unless it is a prompt (of the option `--prompt`). So a lone
    slash, relative paths, addresses and numbers stay as they are.

    Args:
        arguments: the words of the command, its name first.
        root: an absolute path; None is the current directory.
    """
    root = root or Path.cwd()
    words = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        is_text = before in _FREE_TEXT or option in _FREE_TEXT
        words.append(argument if is_text else option + equals + _shortened(value, root))
    return shlex.join(words)


def portable(settings: dict[str, Any], root: Path | None = None) -> dict[str, Any]:
    """Return JSON-like settings with every value that is an absolute path shortened, as `portable_command` does it."""
    return {
        key: value if key in _FREE_TEXT else _portable(value, root or Path.cwd()) for key, value in settings.items()
    }


def _portable(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return portable(value, root)
    if isinstance(value, list | tuple):
        return [_portable(each, root) for each in value]
    return _shortened(value, root) if isinstance(value, str) else value


def _shortened(text: str, root: Path) -> str:
    """Return an absolute path relative to the root or as its last name, and any other text as it is."""
    path = Path(os.path.normpath(text))
    if path.is_absolute() and path.is_relative_to(root) and root.name:
        return str(path.relative_to(root))
    return (path.name or text) if _PATH.fullmatch(text) else text
