"""Statistics on disk: a folder for each combination of checkpoint, calibration tokens and precision.

Found by content (hashes), never by name. What is damaged or of another release is computed again and never trusted.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from layer_surgery import parallel
from layer_surgery.calibration.bypass import MapWorth
from layer_surgery.calibration.collector import collect
from layer_surgery.calibration.couplings import Couplings
from layer_surgery.calibration.statistics import Ranks, Statistics, useful_ranks
from layer_surgery.calibration.units import UnitOrder
from layer_surgery.checkpoint.contents import file_sha256
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.disk.own import own_directory, remove_dead
from layer_surgery.disk.reading import read_json, why
from layer_surgery.disk.renaming import rename_new, sync, sync_tree
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.journal import NOTHING_KEPT, Journal, Steps
from layer_surgery.machine import code_sha256
from layer_surgery.records import Part
from layer_surgery.walk.walk import Walk, boundary_steps

RECORD_FILE = "statistics.json"
_STAGING = ".statistics.partial-"


class StatisticsCache:
    """Statistics of all layers, each in a folder that is found by the content of what they were made from."""

    def __init__(self, directory: Path, base_sha256: str, note: Callable[[str], None], *, maps: bool = False) -> None:
        """Keep statistics in `directory`; `base_sha256` is the checkpoint's hash ("": not known yet).

        With `maps` they hold linear maps for MLPs too.
        """
        self._directory, self._base_sha256, self._note, self._maps = directory, base_sha256, note, maps

    def get(
        self, walk: Walk, scratch: Path, dtype: torch.dtype, part: Part, journal: Journal = NOTHING_KEPT
    ) -> Statistics | None:
        """Return the statistics of all layers, made now if they are not there; None, with a note, if they cannot be
        kept.

        Args:
            walk: over the calibration tokens.
            scratch: for components that another run is faster to keep.
            dtype: of the stored components.
            part: what of the layers costs are measured for.
            journal: where finished layers are while not all are.
        """
        identity = {
            "code_sha256": code_sha256(),
            "checkpoint_sha256": self._base_sha256 or walk.model.checkpoint.sha256(),
            "part": part,
            "maps": self._maps,
            "decomposition": walk.settings.decomposition,
            "data_sha256": walk.tokens.sha256,
            "compute_dtype": str(walk.model.dtype),
            "stored_dtype": str(dtype),
            "device": walk.model.device.type,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
        folder = self._directory / key
        parallel.from_first(self._remove_dead)
        if parallel.from_first(folder.exists):
            statistics, damage = None, ""
            try:
                statistics = _read(folder, identity, Statistics.empty(walk, FactorStore(folder, dtype)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                damage = str(error)
            damage = next(filter(None, parallel.gather(damage)), "")  # what one cannot read, none uses
            if statistics is not None and not damage:
                self._note(f"statistics: from the cache, {folder}")
                return statistics
            self._note(f"warning: the cached statistics in {folder} are not used ({damage}); computing them again")
            if parallel.is_first():
                shutil.rmtree(folder, ignore_errors=True)
        with ExitStack() as stack:
            staging = parallel.from_first(lambda: self._staging(stack, key))
            if staging is None:
                return None
            every = useful_ranks(walk.model, range(walk.model.layer_count), part)
            steps = statistics_steps(journal, every, part, self._maps)
            folder_of_steps = steps.folder("components")
            statistics = Statistics.empty(walk, FactorStore(folder_of_steps or Path(staging), dtype))
            forward = boundary_steps(journal, walk)
            collect(walk, statistics, every, part, maps=self._maps, forward=forward, steps=steps)
            parallel.barrier()  # all have written and read there what they will
            final = parallel.from_first(lambda: self._put(Path(staging), folder, scratch / key, identity, statistics))
        statistics.components = FactorStore(Path(final), dtype)
        return statistics

    def _remove_dead(self) -> None:
        for left in remove_dead(self._directory, _STAGING):
            self._note(f"removed {left}, which a run that was killed has left in the cache")

    def _staging(self, stack: ExitStack, key: str) -> str | None:
        """Return a new folder in the cache, gone with the stack; None, with a note, if it cannot be made."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(own_directory(self._directory, _STAGING)) / key
            staging.mkdir()
        except OSError as error:
            reason = f"--cache {self._directory} cannot be written ({why(error)})"
            self._note(f"warning: statistics are not kept: {reason}")
            return None
        return str(staging)

    def _put(
        self, staging: Path, folder: Path, other: Path, identity: Mapping[str, Any], statistics: Statistics
    ) -> str:
        """Complete a staging folder and move it to where it is found from now on; return where it is."""
        mine = statistics.components.directory
        try:
            if mine != staging:  # in a journal, which keeps its own
                shutil.copytree(mine, staging, dirs_exist_ok=True)
            _write(staging, identity, statistics)
            sync_tree(staging)
            rename_new(staging, folder)
            sync(self._directory)
            return str(folder)
        except OSError as error:
            if not folder.exists():  # else another run has put the same there, and may be reading it
                self._note(f"warning: statistics are not kept in {self._directory} ({why(error)})")
            if mine != staging:
                return str(mine)
            if not staging.exists():
                return str(folder)
        try:
            return str(shutil.move(staging, other))
        except OSError as error:
            raise LayerSurgeryError(
                f"the statistics can be kept neither in --cache {self._directory} nor in {other.parent} "
                f"({why(error)}); make room, or leave --cache out."
            ) from error


def statistics_steps(journal: Journal, layers: Mapping[int, Ranks], part: Part, maps: bool) -> Steps:
    """Return where a run keeps the statistics of the layers that it has finished."""
    ranks = {str(index): dict(each) for index, each in layers.items()}
    return journal.stage("statistics", ranks, part, maps)


def _write(folder: Path, identity: Mapping[str, Any], statistics: Statistics) -> None:
    files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {
        "identity": dict(identity),
        "loss_scale": statistics.loss_scale,
        "sizes": statistics.sizes,
        "values": statistics.values,
        "ranks": statistics.ranks,
        "channels": {index: asdict(order) for index, order in statistics.channels.items()},
        "heads": {index: asdict(order) for index, order in statistics.heads.items()},
        "experts": {index: [asdict(order) for order in orders] for index, orders in statistics.experts.items()},
        "maps": {index: asdict(worth) for index, worth in statistics.maps.items()},
        "couplings": statistics.couplings.to_dict(),
        "files": files,
    }
    text = json.dumps({"sha256": _record_sha256(record), "record": record}, allow_nan=False)
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def _read(folder: Path, identity: Mapping[str, Any], empty: Statistics) -> Statistics:
    """Read a folder into empty statistics and check every byte. Raises `ValueError` and the like for what is wrong."""
    stored = read_json(folder / RECORD_FILE)
    record = stored["record"]
    if stored["sha256"] != _record_sha256(record):
        raise ValueError(f"{RECORD_FILE} is damaged")
    if record["identity"] != dict(identity):
        raise ValueError("they were made from something else or by another release")
    for name, sha256 in record["files"].items():
        if Path(name).name != name or file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} is damaged")
    unlisted = {path.name for path in folder.glob("*.safetensors")} - set(record["files"])
    if unlisted:
        raise ValueError(f"{min(unlisted)} does not belong there")
    by_layer = {
        part: {int(index): entries for index, entries in record[part].items()} for part in ("sizes", "values", "ranks")
    }
    sizes = {i: {name: (int(out), int(in_)) for name, (out, in_) in s.items()} for i, s in by_layer["sizes"].items()}
    values, ranks = by_layer["values"], by_layer["ranks"]
    if not all(values[i].keys() == sizes[i].keys() == ranks[i].keys() for i in {*sizes, *values, *ranks}):
        raise ValueError(f"{RECORD_FILE} contradicts itself")
    couplings = Couplings.from_dict(record["couplings"])
    channels, heads = (
        {int(index): UnitOrder(**entry) for index, entry in record[units].items()} for units in ("channels", "heads")
    )
    experts = {int(index): [UnitOrder(**entry) for entry in entries] for index, entries in record["experts"].items()}
    maps = {int(index): MapWorth(**entry) for index, entry in record["maps"].items()}
    orders = [*channels.values(), *heads.values(), *(order for each in experts.values() for order in each)]
    if not all(sorted(each.order) == list(range(len(each.gains))) for each in orders):
        raise ValueError(f"{RECORD_FILE} has channels or heads that are none")
    return replace(
        empty,
        sizes=sizes,
        values=values,
        ranks=ranks,
        channels=channels,
        heads=heads,
        experts=experts,
        maps=maps,
        couplings=couplings,
    )


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
