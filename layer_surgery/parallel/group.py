"""The processes of one job: who is who, messages between them, and work shared out.

Messages are JSON and tensors; nothing is pickled. All processes call these functions in the same order.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layer_surgery.disk.reading import why
from layer_surgery.errors import LayerSurgeryError, NumericalError, OutputError, UserError


@dataclass(frozen=True)
class Group:
    """The processes of this job, as one of them sees it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  #: Among the processes of this machine.
    local_world: int = 1


_group = Group()


def group() -> Group:
    """Return the group that this process has joined; alone, one of one."""
    return _group


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return _group.rank == 0


@contextmanager
def member(joined: Group) -> Iterator[Group]:
    """Let this process be one of a group, whose torch process group exists, for the duration of the block."""
    global _group
    before, _group = _group, joined
    try:
        yield joined
    finally:
        _group = before


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as one of one for the duration of the block, in which it exchanges nothing with others.

    It then finds what all would find together: the number of processes changes no bit.
    """
    with member(Group()):
        yield


# Messages: JSON and tensors


def gather(value: Any) -> list[Any]:
    """Return the JSON values that the processes gave, by rank. All of them are here before any goes on."""
    if _group.world == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_group.world)]
    exchanged(lambda: dist.all_gather(sizes, torch.tensor([len(own)])))
    room = max(int(size) for size in sizes)
    texts = [torch.empty(room, dtype=torch.uint8) for _ in sizes]
    padded = torch.zeros(room, dtype=torch.uint8)
    padded[: len(own)] = own
    exchanged(lambda: dist.all_gather(texts, padded))
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def barrier() -> None:
    """Wait for all processes. What one has written to a folder that they share is then there for the others."""
    gather(None)


def from_first(make: Callable[[], Any]) -> Any:
    """Return the JSON value that the first process makes; the others wait for it. What it refuses, all refuse."""
    value = None
    with together():
        if is_first():
            value = make()
    return gather(value)[0]


@contextmanager
def together() -> Iterator[None]:
    """Have all processes raise what one of them has refused, or found not to be finite, in the block; see `in_step`.

    Nothing is exchanged in the block.
    """
    if _group.world == 1:
        yield
        return
    met: UserError | NumericalError | None = None
    try:
        yield
    except (UserError, NumericalError) as error:
        met = error
    said = next(filter(None, gather(None if met is None else [isinstance(met, UserError), str(met)])), None)
    if said is not None:
        raise met or (UserError if said[0] else NumericalError)(said[1])


def new_folder(parent: Path | None, prefix: str) -> Path:
    """Return a new folder that the first process makes (in `parent`, else where the system keeps temporary files).

    Raises `UserError` if it cannot be made, or unless all processes see it.
    """
    folder = Path(from_first(lambda: _made(parent, prefix)))
    _check_seen(folder)
    return folder


def _made(parent: Path | None, prefix: str) -> str:
    try:
        return tempfile.mkdtemp(prefix=prefix, dir=parent)
    except OSError as error:
        raise OutputError(
            f"scratch files cannot be written to {parent or tempfile.gettempdir()} ({why(error)})."
        ) from error


@contextmanager
def shared_folder(made: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield the folder that the first process gets from a context, which it leaves when all are done with it.

    Raises `UserError` unless all processes see it, and what the context refuses.
    """
    with ExitStack() as stack:
        folder = Path(from_first(lambda: str(stack.enter_context(made))))
        _check_seen(folder)
        yield folder
        barrier()


def _check_seen(folder: Path) -> None:
    unseen = [rank for rank, seen in enumerate(gather(folder.is_dir())) if not seen]
    if unseen:
        raise UserError(
            f"process {unseen[0]} does not see {folder}, which process 0 has made; have --output on a file system that "
            "all machines share."
        )


@contextmanager
def temporary_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """Yield a new folder that all processes share, gone on exit."""
    folder = new_folder(parent, prefix)
    try:
        yield folder
        barrier()  # no process still reads it
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


def in_step(error: Exception) -> bool:
    """Return whether all processes have met this error alike, so that they can go on together without what failed.

    Such are refusals and numbers that are not finite, which all check on the same data or tell each other of
    (`together`); of anything else, as memory or a disk that is full, the others know nothing and would wait for what
    does not come.
    """
    return _group.world == 1 or isinstance(error, UserError | NumericalError)


def check_alone(what: str) -> None:
    """Raise `UserError` if there are several processes, for what works in one only."""
    if _group.world > 1:
        raise UserError(f"{what} works in one process, but {_group.world} were started; start it without a launcher.")


def meet(device: torch.device) -> None:
    """Have all processes exchange something on their GPUs, which nccl wants before some of them do."""
    if _group.world > 1 and device.type == "cuda":
        exchanged(lambda: dist.all_reduce(torch.zeros(1, device=device)))


def total(count: int) -> int:
    """Return the sum of what the processes have counted."""
    return sum(gather(count))


def broadcast(tensor: Tensor | None, source: int, device: torch.device) -> Tensor:
    """Return the tensor that process `source` has, on `device`; the others give None."""
    if _group.world == 1:
        assert tensor is not None
        return tensor
    header = None if tensor is None else [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    shape, dtype = gather(header)[source]
    moved = torch.empty(shape, dtype=getattr(torch, dtype), device=device) if tensor is None else tensor.contiguous()
    if moved.numel():
        exchanged(lambda: dist.broadcast(moved, source))
    return moved


def rows_of_all(own: Tensor, windows: Tensor, count: int) -> Tensor:
    """Return the rows [count, ...] of all processes, on the CPU; `own` [n, ...] are those at `windows` [n] int64."""
    if _group.world == 1:
        return own.cpu()
    rows = torch.zeros(count, *own.shape[1:], dtype=own.dtype)
    rows[windows] = own.cpu()
    exchanged(lambda: dist.all_reduce(rows))  # every row is one process's, and 0 in the others: nothing is rounded
    return rows


def agree(differences: Mapping[str, Any], advice: str) -> None:
    """Raise `UserError`, in all processes alike, unless they have equal JSON values under each name."""
    for name, values in _by_name(gather(dict(differences))).items():
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise UserError(
                f"process {other} has {name} {_short(values[other])}, and process 0 has {_short(values[0])}; {advice}."
            )


def _by_name(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [each.get(name) for each in found] for name in {key: None for each in found for key in each}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def exchanged(exchange: Callable[[], Any]) -> Any:
    """Exchange something with other processes; a connection that breaks means that one of them is gone."""
    try:
        return exchange()
    except RuntimeError as error:  # what gloo and nccl raise
        raise ProcessLost from error


class ProcessLost(LayerSurgeryError):
    """Another process of the job has ended before this one."""

    def __init__(self) -> None:
        super().__init__(
            "a process of this job has died or was stopped, so all of them end; its own message or the "
            "launcher's says why (out of memory, if there is none), and with --resume the same command goes on from "
            "the last finished layer, with --cache from the statistics."
        )


# Work, shared out


def owners(costs: Mapping[str, float]) -> dict[str, int]:
    """Return the process that each piece of work belongs to: the costliest first, each to who has least so far.

    In the order of `costs`.
    """
    load, found = [0.0] * _group.world, dict[str, int]()
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        found[name] = min(range(_group.world), key=lambda rank: (load[rank], rank))
        load[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def own(owner_of: Mapping[str, int], names: Iterable[str] | None = None) -> list[str]:
    """Return the pieces of work of this process, among `names` (default: all)."""
    return [name for name in (owner_of if names is None else names) if owner_of[name] == _group.rank]


def by_owner(owner_of: Mapping[str, int], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON results of all pieces of work, in their order; `results` are those of this process."""
    if _group.world == 1:
        return {name: results[name] for name in owner_of}
    found = gather(dict(results))
    return {name: found[owner][name] for name, owner in owner_of.items()}
