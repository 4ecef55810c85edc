"""Statistics on disk: a folder for each combination of checkpoint, calibration tokens and precision.

Found by content (hashes), never by name. What is damaged or of another release is computed again and never trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from layer_surgery.calibration.couplings import Couplings
from layer_surgery.calibration.statistics import Ranks, Statistics, collect, useful_ranks
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.records import Part
from layer_surgery.walk.walk import Walk

#: Raised whenever what the statistics are, or how they are computed, changes.
SCHEMA_VERSION = 1
RECORD_FILE = "statistics.json"
_LOG = logging.getLogger(__name__)


class StatisticsSource:
    """Gives statistics, computing what is not there: in a scratch folder, or for all layers at once in a cache."""

    def __init__(
        self,
        scratch: Path,
        dtype: torch.dtype,
        *,
        cache: Path | None = None,
        base_sha256: str = "",
        part: Part = "layer",
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Compute into `scratch`, or into a folder of `cache`; `dtype` is that of the stored components.

        `part` of the layers is what costs are measured for.
        """
        self.part = part
        self._scratch, self._dtype, self._cache = scratch, dtype, cache
        self._base_sha256, self._note = base_sha256, note
        self._statistics: Statistics | None = None
        self._parts = 0
        self._trunk: StatisticsSource | None = None
        self._failed = False

    def get(self, walk: Walk, layers: Mapping[int, Ranks]) -> Statistics:
        """Return statistics that hold at least these components."""
        if self._trunk is not None and self._statistics is None:
            self._statistics = self._trunk._whole(walk)
        if self._cache is not None and self._statistics is None:
            self._statistics = self._cached(walk)
        if self._statistics is None or not self._statistics.covers(layers):
            known = self._statistics
            self._statistics = self._new(walk)
            if known is None or self._cache is not None:
                collect(walk, self._statistics, layers, self.part)
            else:
                wanted = dict(layers) | {index: ranks for index, ranks in known.ranks.items() if index not in layers}
                collect(walk, self._statistics, wanted, self.part)
        return self._statistics

    def branch(self, scratch: Path) -> StatisticsSource:
        """Return a source for one of several users, each of which then gets what it would get alone.

        Its first statistics are those of all layers, which this source computes once. What they do not cover it
        computes for itself, into its own `scratch`.
        """
        other = StatisticsSource(
            scratch,
            self._dtype,
            cache=self._cache,
            base_sha256=self._base_sha256,
            part=self.part,
            note=self._note,
        )
        other._trunk = self
        return other

    def _whole(self, walk: Walk) -> Statistics | None:
        """Return the statistics of all layers, computed once; None if one of the layers does not allow it."""
        if self._statistics is None and not self._failed:
            self._failed = True
            linears = useful_ranks(walk.model, range(walk.model.layer_count), self.part)
            try:
                self.get(walk, {index: ranks for index, ranks in linears.items() if ranks})
                self._failed = False
            except LayerSurgeryError as error:
                _LOG.debug("there are no statistics of all layers: %s", error)
            finally:
                if self._failed:
                    self._statistics = None
        return self._statistics

    def _new(self, walk: Walk) -> Statistics:
        self._parts += 1
        directory = self._scratch / f"components-{self._parts}"
        directory.mkdir()
        return Statistics(FactorStore(directory, self._dtype), loss_scale(walk.tokens), fed_by=_fed_by(walk))

    def _cached(self, walk: Walk) -> Statistics | None:
        """Return the statistics of all layers; None, with a warning, if they are not there and cannot be kept."""
        assert self._cache is not None
        identity = self._identity(walk)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
        folder = self._cache / key
        if folder.exists():
            try:
                statistics = _read(folder, identity, self._dtype)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._note(f"warning: the cached statistics in {folder} are not used ({error}); computing them again")
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self._note(f"statistics: from the cache, {folder}")
                statistics.fed_by = _fed_by(walk)
                return statistics
        staging = self._cache / f".{key}.partial-{secrets.token_hex(4)}"
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            self._note(f"warning: statistics are not kept: --cache {self._cache} cannot be written ({error.strerror})")
            self._cache = None
            return None
        try:
            statistics = Statistics(FactorStore(staging, self._dtype), loss_scale(walk.tokens), fed_by=_fed_by(walk))
            linears = useful_ranks(walk.model, range(walk.model.layer_count), self.part)
            collect(walk, statistics, linears, self.part)
            _write(staging, identity, statistics)
            try:
                staging.rename(folder)
            except OSError:  # another run has put the same there in the meantime and may be reading it
                folder = Path(shutil.move(staging, self._scratch / key))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        statistics.components = FactorStore(folder, self._dtype)
        return statistics

    def _identity(self, walk: Walk) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint_sha256": self._base_sha256 or walk.model.checkpoint.sha256(),
            "part": self.part,
            "data_sha256": walk.tokens.sha256,
            "compute_dtype": str(walk.model.dtype),
            "stored_dtype": str(self._dtype),
            "device": walk.model.device.type,
        }


def check_cache(cache: Path | None) -> None:
    """Raise `UserError` if a cache is neither a directory nor can be made. One that is read-only may be of use."""
    if cache is None or cache.is_dir():
        return
    nearest = next(place for place in cache.absolute().parents if place.exists())
    if cache.exists() or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--cache {cache} is no directory and cannot be made one; give another directory.")


def _fed_by(walk: Walk) -> dict[str, tuple[str, ...]]:
    architecture = walk.model.architecture
    return {names[-1]: names[:-1] for names in (architecture.attention, architecture.mlp) if names}


def loss_scale(tokens: PackedTokens) -> float:
    """Return the number of tokens for each one that carries loss."""
    return int(tokens.valid.sum()) / tokens.predicted_tokens


def _write(folder: Path, identity: Mapping[str, Any], statistics: Statistics) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {
        "identity": dict(identity),
        "loss_scale": statistics.loss_scale,
        "sizes": statistics.sizes,
        "values": statistics.values,
        "ranks": statistics.ranks,
        "couplings": statistics.couplings.to_dict(),
        "files": files,
    }
    text = json.dumps({"sha256": _record_sha256(record), "record": record}, allow_nan=False)
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def _read(folder: Path, identity: Mapping[str, Any], dtype: torch.dtype) -> Statistics:
    """Read a folder and check every byte of it. Raises `ValueError` and the like for what is not right."""
    stored = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    record = stored["record"]
    if stored["sha256"] != _record_sha256(record):
        raise ValueError(f"{RECORD_FILE} is damaged")
    if record["identity"] != dict(identity):
        raise ValueError("they were made from something else or by another release")
    for name, sha256 in record["files"].items():
        if Path(name).name != name or _sha256(folder / name) != sha256:
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
    return Statistics(FactorStore(folder, dtype), float(record["loss_scale"]), sizes, values, ranks, couplings)


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
