"""Files changed at random, by a generator that is seeded: their bytes, or a value somewhere in their JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

#: Values that are put in the place of others: of other types, sizes and signs, and text that means something elsewhere.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.5, 1e-320, 1e308, float("nan")),
    *(
        float("inf"),
        "",
        "x",
        "0",
        "-1",
        "nan",
        "../../etc/passwd",
        "/dev/zero",
        "\x00",
        "\x1b[31mred",
        "a\nb",
        "é" * 300,
    ),
    *("<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", [], [None], [[]], {}, {"": None}, [1] * 2000, "x" * 5000),
)
_BYTES = (b"\x00", b"\xff", b"\xfe\xff", b"{", b"}", b"[", b'"', b",", b"\n", b"1e999", b"NaN", b"-", b"\\u0000", b"\r")


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to three changes: bits flipped, pieces cut, doubled, moved or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 2, 8, 64, 512))
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at:at] = draw.choice(_BYTES)
        else:
            changed[at : at + length] = draw.randbytes(length)
    return bytes(changed)


def mutated_value(value: Any, draw: random.Random) -> Any:
    """Return JSON with one to three changes: a value replaced, left out, doubled, or one that was not there."""
    changed = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        changed = _changed_somewhere(changed, draw)
    return changed


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    """Return a JSON file with a change in its values, or one time in four in its bytes."""
    if draw.random() < 0.25:
        return mutated_bytes(content, draw)
    return json.dumps(mutated_value(json.loads(content), draw)).encode("utf-8", "surrogatepass")


def mutated_lines(content: bytes, draw: random.Random) -> bytes:
    """Return a file of JSON lines with a change in one of them, or one time in four in its bytes."""
    lines = content.splitlines()
    if draw.random() < 0.25 or not lines:
        return mutated_bytes(content, draw)
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(mutated_value(json.loads(lines[at]), draw)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


Mutate = Callable[[bytes, random.Random], bytes]


def _changed_somewhere(value: Any, draw: random.Random) -> Any:
    """Change one place, found from the top down, so that places near the top are as likely as the many below."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return _changed(value, draw)
    key: Any = draw.choice([*value]) if isinstance(value, dict) else draw.randrange(len(value))
    kind = draw.random()
    if kind < 0.08:
        del value[key]
    elif kind < 0.12 and isinstance(value, dict):
        value[draw.choice(("", "x", "__class__", f"{key}{key}"))] = draw.choice(VALUES)
    elif kind < 0.14 and isinstance(value, list):
        value.insert(key, copy.deepcopy(value[key]))
    else:
        value[key] = _changed_somewhere(value[key], draw)
    return value


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.4:
        return draw.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value)))
    return draw.choice(VALUES)
