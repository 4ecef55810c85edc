"""Statistics on disk: used again for the same content, and never trusted when something is wrong with them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import listing, tensors_of
from tiny_models import CALIBRATION, packed_tokens, settings, streamed, tiny_checkpoint, tiny_model
from torch import Tensor

import layer_surgery
from layer_surgery.calibration import cache as statistics_cache
from layer_surgery.calibration.cache import RECORD_FILE
from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.calibration.statistics import Statistics, useful_ranks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import UserError
from layer_surgery.progress import Ui
from layer_surgery.walk.walk import Walk

DTYPE = torch.float64


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every backward walk."""
    seen: list[str] = []
    backpropagate = Walk.backpropagate

    def counted(self: Walk, *args: Any, **kwargs: Any) -> None:
        seen.append("backward")
        backpropagate(self, *args, **kwargs)

    monkeypatch.setattr(Walk, "backpropagate", counted)
    return seen


class Cached:
    """Asks for statistics through one cache, each time with a new source, as a new run would."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.cache, self.notes = directory, directory / "cache", list[str]()
        self.model: Any = tiny_checkpoint(directory)
        self._runs = 0

    def get(
        self,
        *,
        model: Any = None,
        tokens: PackedTokens = CALIBRATION,
        compute: torch.dtype = DTYPE,
        stored: torch.dtype = DTYPE,
        layers: dict[int, dict[str, int]] | None = None,
    ) -> Statistics:
        self._runs += 1
        scratch = self.directory / f"scratch-{self._runs}"
        scratch.mkdir()
        streaming = streamed(self.model if model is None else model, dtype=compute)
        source = StatisticsSource(scratch, stored, cache=self.cache, note=self.notes.append)
        with Walk(streaming, tokens, settings(scratch)) as walk:
            return source.get(walk, layers or useful_ranks(streaming, range(streaming.layer_count)))

    @property
    def folder(self) -> Path:
        (found,) = self.cache.iterdir()
        return found


@pytest.fixture
def cached(tmp_path: Path) -> Cached:
    return Cached(tmp_path)


def content(statistics: Statistics) -> tuple[Any, ...]:
    return statistics.sizes, statistics.values, statistics.ranks, statistics.loss_scale, statistics.couplings


def components(statistics: Statistics) -> dict[str, Tensor]:
    return {f"{i}.{name}": tensor for i in statistics.ranks for name, tensor in statistics.components.read(i).items()}


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert content(one) == content(other)
    assert all(torch.equal(a, b) for a, b in zip(components(one).values(), components(other).values(), strict=True))
    assert components(one).keys() == components(other).keys()


# Used again


def test_what_was_kept_is_read_back_without_a_walk(cached: Cached, walks: list[str]) -> None:
    first = cached.get()
    second = cached.get(layers={2: {"mlp.up_proj": 3}})
    assert walks == ["backward"]
    assert_equal(first, second)
    assert cached.notes == [f"statistics: from the cache, {cached.folder}"]


def test_all_layers_are_kept_whatever_was_asked_for(cached: Cached, walks: list[str]) -> None:
    cached.get(layers={2: {"mlp.up_proj": 3}})
    assert cached.get(layers={0: {"self_attn.q_proj": 9}}).covers({3: {"mlp.down_proj": 17}})
    assert walks == ["backward"]


def test_more_than_is_kept_is_computed(cached: Cached, walks: list[str]) -> None:
    cached.get()
    statistics = cached.get(layers={1: {"mlp.up_proj": 32}})
    assert statistics.covers({1: {"mlp.up_proj": 32}})
    assert walks == ["backward"] * 2


def test_the_same_content_under_another_name_is_found(cached: Cached, walks: list[str]) -> None:
    cached.get()
    moved = shutil.move(cached.model, cached.directory / "elsewhere")
    cached.get(model=moved, tokens=replace(CALIBRATION, name="another name"))
    cached.get(model=tiny_model())  # in memory
    assert walks == ["backward"]


def altered_model() -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"model": altered_model},
        {"tokens": lambda: replace(packed_tokens(5, 12, seed=1), sha256="1" * 64)},
        {"compute": lambda: torch.float32},
        {"stored": lambda: torch.float32},
    ],
    ids=["weights", "data", "compute dtype", "stored dtype"],
)
def test_other_content_is_computed_and_kept_beside(
    cached: Cached, walks: list[str], change: dict[str, Callable[[], Any]]
) -> None:
    cached.get()
    cached.get(**{name: value() for name, value in change.items()})
    assert walks == ["backward"] * 2
    assert len(list(cached.cache.iterdir())) == 2


# Never trusted


def damage_components(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[3]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def change_record(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = json.loads((folder / RECORD_FILE).read_text())
        stored["record"] |= changes
        (folder / RECORD_FILE).write_text(json.dumps(stored))

    return change


def other_schema(folder: Path) -> None:
    """As an earlier or later release would have written it: whole, with a hash that is right."""
    stored = json.loads((folder / RECORD_FILE).read_text())
    stored["record"]["identity"]["code_sha256"] = "of another release"
    stored["sha256"] = statistics_cache._record_sha256(stored["record"])
    (folder / RECORD_FILE).write_text(json.dumps(stored))


def write_record(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / RECORD_FILE).write_text(text)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of a component": damage_components,
    "a component is gone": lambda folder: min(folder.glob("*.safetensors")).unlink(),
    "a foreign component": lambda folder: (folder / "layer-00001-x.safetensors").write_bytes(b"?"),
    "a value in the record": change_record(loss_scale=2.0),
    "another schema": other_schema,
    "half of the record": lambda folder: write_record((folder / RECORD_FILE).read_text()[:400])(folder),
    "an empty record": write_record(""),
    "a list": write_record("[1, 2]"),
    "another JSON": write_record('{"record": null, "sha256": ""}'),
    "not text": lambda folder: (folder / RECORD_FILE).write_bytes(b"\xff\xfe\x00"),
    "no record": lambda folder: (folder / RECORD_FILE).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_computed_again_with_a_warning(
    cached: Cached, walks: list[str], damage: Callable[[Path], Any]
) -> None:
    first = cached.get()
    expected = {name: tensor.clone() for name, tensor in components(first).items()}
    damage(cached.folder)
    second = cached.get()
    assert walks == ["backward"] * 2
    (note,) = cached.notes
    assert note.startswith(f"warning: the cached statistics in {cached.folder} are not used (")
    assert content(second) == content(first)
    assert components(second).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in components(second).items())
    cached.get()
    assert walks == ["backward"] * 2, "the damaged statistics were not replaced"


def test_a_file_in_the_place_of_the_folder_is_left_and_the_result_is_right(cached: Cached, walks: list[str]) -> None:
    first = cached.get()
    expected = {name: tensor.clone() for name, tensor in components(first).items()}
    folder = cached.folder
    shutil.rmtree(folder)
    folder.write_text("someone else's")
    second = cached.get()
    assert content(second) == content(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in components(second).items())
    assert folder.read_text() == "someone else's"
    assert walks == ["backward"] * 2 and len(cached.notes) == 1


def test_a_run_that_was_faster_is_not_disturbed(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run puts the same statistics there while this one is at work: both have theirs."""
    others: list[Statistics] = []
    before: dict[str, str] = {}
    write = statistics_cache._write

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(statistics_cache, "_write", write)
        others.append(cached.get())
        before.update(listing(others[0].components.directory))
        write(*arguments)

    monkeypatch.setattr(statistics_cache, "_write", overtaken)
    ours = cached.get()
    assert_equal(ours, others[0])
    assert cached.folder == others[0].components.directory != ours.components.directory
    assert listing(cached.folder) == before


# Failures


def test_a_failure_leaves_nothing_in_the_cache(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_cache, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cached.get()
    assert list(cached.cache.iterdir()) == []


@pytest.mark.parametrize("depth", [0, 1])
def test_a_cache_that_cannot_be_written_is_a_warning(
    cached: Cached, walks: list[str], monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Neither a folder in it can be made, nor, at the other depth, one in that."""
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if cached.cache in self.parents[depth:]:
            raise PermissionError(13, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    statistics = cached.get()
    assert walks == ["backward"] and statistics.values
    (note,) = cached.notes
    assert note == f"warning: statistics are not kept: --cache {cached.cache} cannot be written (Permission denied)"


def test_what_a_dead_run_has_left_goes_though_the_statistics_are_there(cached: Cached, walks: list[str]) -> None:
    cached.get()
    dead = cached.cache / f"{statistics_cache._STAGING}{'0' * 16}"
    dead.mkdir()
    cached.get()
    assert not dead.exists() and walks == ["backward"]
    assert any(note.startswith(f"removed {dead}") for note in cached.notes)


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/below"])
def test_a_cache_that_cannot_be_a_directory_is_refused_before_any_work(tmp_path: Path, model: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    options: dict[str, Any] = {"layers": [1], "cache": tmp_path / place, "output": tmp_path / "output"}
    before = listing(tmp_path)
    score = functools.partial(layer_surgery.score, scorer="fisher", cache=tmp_path / place)
    for command in (functools.partial(layer_surgery.compress, **options), score):
        with pytest.raises(UserError, match=r"--cache .* is no directory and cannot be made one"):
            command(model)
    assert listing(tmp_path) == before


# As a user has it


@pytest.mark.parametrize("refit", [False, True])
def test_another_budget_needs_no_walk_and_gives_what_it_gives_without_a_cache(
    tmp_path: Path, model: Path, text: Path, walks: list[str], refit: bool
) -> None:
    notes: list[str] = []
    options: dict[str, Any] = {"target_layers": 2, "scorer": "fisher", "ui": Ui(note=notes.append)}
    options |= {"calibration": text, "samples": 6, "sequence_length": 16}
    method: dict[str, Any] = {"method": "fisher", "refit": refit, "eval_data": None}
    cache = tmp_path / "cache"
    layer_surgery.compress(model, tmp_path / "first", keep=0.3, cache=cache, **method, **options)
    assert walks == ["backward"]
    second = layer_surgery.compress(model, tmp_path / "second", keep=0.5, cache=cache, **method, **options)
    assert walks == ["backward"]
    assert any(note.startswith("statistics: from the cache") for note in notes)
    without = layer_surgery.compress(model, tmp_path / "without", keep=0.5, **method, **options)
    assert walks == ["backward"] * 2
    assert second.plan == without.plan and second.scores == without.scores
    ours, theirs = tensors_of(tmp_path / "second"), tensors_of(tmp_path / "without")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    scores = layer_surgery.score(model, cache=cache, **options)
    assert walks == ["backward"] * 2
    assert len(scores.values) == 4
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".gitattributes"], "scratch is left behind"
