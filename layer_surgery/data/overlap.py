"""Long sequences in overlapping windows, each of which answers for the tokens that it sees the most around."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `[start, end)` of a sequence; the window answers for `[first, last)` of them, and for no others."""

    start: int
    end: int
    first: int
    last: int


def windows(length: int, room: int, overlap: int) -> list[Window]:
    """Return windows of at most `room` tokens over `length` of them, neighbours sharing at least `overlap`.

    The last one ends with the sequence and is full like the others, so that it shares more. What two windows share is
    divided in its middle; so every token has exactly one window that answers for it, with at least half of the overlap
    on either side of it, except at the ends of the sequence.

    Raises `ValueError` unless `0 <= overlap < room`.
    """
    if not 0 <= overlap < room:
        raise ValueError(f"an overlap of {overlap} tokens does not go into windows of {room}.")
    starts = [*range(0, max(1, length - room), room - overlap)]
    if length > room:
        starts.append(length - room)
    ends = [min(length, start + room) for start in starts]
    middles = [(start + end) // 2 for start, end in zip(starts[1:], ends[:-1], strict=True)]
    return [Window(*each) for each in zip(starts, ends, [0, *middles], [*middles, length], strict=True)]
