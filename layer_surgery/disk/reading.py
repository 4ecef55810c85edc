"""Files that others have written, read with a limit, and JSON that may be anything."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

#: Text files of a checkpoint, plans and the like are far smaller; the largest tokenizers have 40 MB.
TEXT_BYTES = 500_000_000
#: Objects and lists within each other that JSON may have; none of ours, nor of a checkpoint's, has a tenth of it.
DEPTH = 100
_TOO_DEEP = f"it has more than {DEPTH} objects or lists within each other"


def read_bytes(path: Path, most: int = TEXT_BYTES) -> bytes:
    """Return what a regular file holds.

    Raises `OSError`, whose `strerror` says why: also for what is no regular file (a pipe would wait for ever, a device
    may have no end) and for more than `most` bytes.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    with open(descriptor, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def check_regular(path: Path) -> None:
    """Raise `OSError`, whose `strerror` says why, unless a path leads to a regular file."""
    kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is no regular file but a pipe, a socket or a device", str(path))


def read_json(path: Path, most: int = TEXT_BYTES, **how: Any) -> Any:
    """Return the JSON in a regular file; `how` goes to `json.loads`.

    Raises `OSError` as `read_bytes` does, and `ValueError` for what is not JSON or nested too deeply to be any of ours.
    """
    return parse_json(read_bytes(path, most), **how)


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Return the JSON in a text; `how` goes to `json.loads`.

    Raises `ValueError` for what is not JSON, and for more than `DEPTH` objects or lists within each other, which would
    overflow the stack of whatever walks over them.
    """
    try:
        data = json.loads(text if isinstance(text, str) else text.decode("utf-8"), **how)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [data]
    for _ in range(DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return data
    raise ValueError(_TOO_DEEP)


def _children(value: Any) -> list[Any]:
    """Return what stands in an object or a list and can itself hold something."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in values if isinstance(each, dict | list)]


def why(error: OSError) -> str:
    """Return the reason of a file system's error, in words."""
    return error.strerror or " ".join(str(error).split())
