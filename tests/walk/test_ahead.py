"""Layers that are read ahead: the same tensors, one at a time, errors where the layer is asked for, nothing unasked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import saved_model
from torch import Tensor

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.tensors import SafetensorsSource
from layer_surgery.data.tokens import packed_tokens
from layer_surgery.errors import CheckpointError, NumericalError
from layer_surgery.linalg.low_rank import Factors
from layer_surgery.walk.ahead import ReadAhead
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings

CPU = torch.device("cpu")


def streamed(path: Path, *, ahead: bool) -> StreamedModel:
    return StreamedModel(
        open_checkpoint(path), device=CPU, dtype=torch.float32, resident_bytes=0, ahead_bytes=1 << 30 if ahead else 0
    )


def walk_over(model: StreamedModel, scratch: Path) -> Walk:
    ids = torch.randint(5, 40, (6, 8), generator=torch.Generator().manual_seed(0))
    tokens = packed_tokens("random", ids, torch.ones_like(ids) > 0, torch.ones_like(ids) > 0, 48)
    return Walk(model, tokens, WalkSettings(batch_size=2, boundary_memory_bytes=0, scratch=scratch))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Of every read of files: the thread, and the first tensor."""
    seen: list[tuple[str, str]] = []
    read = SafetensorsSource.read

    def watched(self: SafetensorsSource, names: Any, device: torch.device) -> dict[str, Tensor]:
        names = list(names)
        seen.append((threading.current_thread().name.partition("_")[0], names[0]))
        return read(self, names, device)

    monkeypatch.setattr(SafetensorsSource, "read", watched)
    return seen


def test_a_walk_reads_every_layer_but_the_first_ahead_and_once(
    model: Path, tmp_path: Path, reads: list[tuple[str, str]]
) -> None:
    with walk_over(streamed(model, ahead=True), tmp_path) as walk:
        reads.clear()
        walk.forward(range(4), keep=True)
        assert [thread for thread, _name in reads] == ["MainThread", "read-ahead", "read-ahead", "read-ahead"]
        layers = [name.split(".")[2] for _thread, name in reads]
        assert layers == ["0", "1", "2", "3"]
        reads.clear()
        walk.backpropagate([])
        assert [name.split(".")[2] for _thread, name in reads] == ["3", "2", "1", "0"]
        assert {thread for thread, _name in reads} == {"read-ahead"}


def test_what_is_read_ahead_gives_the_same_bits(model: Path, tmp_path: Path) -> None:
    found = []
    for ahead in (False, True):
        with walk_over(streamed(model, ahead=ahead), tmp_path) as walk:
            last = walk.forward(range(4), keep=True)
            found.append((last.read(slice(0, 6)).clone(), walk.losses(last).sums))
    for without, with_ in zip(*found, strict=True):
        assert torch.equal(without, with_)


def test_a_layer_that_does_not_fit_is_not_read_ahead(model: Path, tmp_path: Path, reads: list[tuple[str, str]]) -> None:
    checkpoint = open_checkpoint(model)
    layer = sum(parameter.numel() * 4 for parameter in checkpoint.layers[0].parameters())
    for ahead_bytes, threads in ((2 * layer - 1, {"MainThread"}), (2 * layer, {"MainThread", "read-ahead"})):
        streamed = StreamedModel(checkpoint, device=CPU, dtype=torch.float32, resident_bytes=0, ahead_bytes=ahead_bytes)
        with walk_over(streamed, tmp_path) as walk:
            reads.clear()
            walk.forward(range(4), keep=True)
        assert {thread for thread, _name in reads} == threads


def test_a_file_that_goes_while_a_layer_is_read_ahead_is_told_as_ever(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    walked = streamed(path, ahead=True)
    with walked.layer(0):
        (path / "model.safetensors").unlink()
        walked.read_ahead(1)
    with pytest.raises(CheckpointError, match="has gone or changed since it was opened"), walked.layer(1):
        pass


def test_a_damaged_layer_that_is_read_ahead_is_told_as_ever(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with (
        walk_over(streamed(path, ahead=True), tmp_path) as walk,
        pytest.raises(NumericalError, match=r"layers\.2\.mlp\.up_proj\.weight.*NaN or Inf"),
    ):
        walk.forward(range(4), keep=True)


def test_a_layer_that_is_replaced_is_not_taken_as_it_was_read_before(model: Path) -> None:
    walked = streamed(model, ahead=True)
    out, in_ = walked.layers[1].get_submodule("mlp.up_proj").weight.shape
    left, right = Factors(torch.ones(out, 1), torch.ones(1, in_))
    with walked.layer(0, 1):
        names = {"mlp.up_proj.out_factor.weight": left, "mlp.up_proj.in_factor.weight": right}
        walked.replace(1, {"mlp.up_proj": 1}, lambda: names)
    with walked.layer(1) as layer:
        assert {"mlp.up_proj.out_factor.weight"} <= set(layer.state_dict())
        assert torch.equal(layer.get_parameter("mlp.up_proj.out_factor.weight"), left)


def test_one_thing_at_a_time_and_only_what_is_asked_for() -> None:
    seen: list[int] = []

    def read(number: int) -> dict[str, Tensor]:
        seen.append(number)
        if number == 9:
            raise CheckpointError("nine")
        return {"x": torch.tensor(number)}

    ahead = ReadAhead(read, CPU)
    assert ahead.take(0) is None
    ahead.begin(1)
    ahead.begin(1)
    found = ahead.take(1)
    assert found is not None and int(found["x"]) == 1
    assert ahead.take(1) is None
    ahead.begin(9)
    ahead.begin(2)  # what failed and is not asked for is nobody's
    assert ahead.take(3) is None
    assert ahead.take(2) is None
    ahead.begin(9)
    with pytest.raises(CheckpointError, match="nine"):
        ahead.take(9)
    assert seen.count(1) == 1


def test_reading_boundaries_ahead_changes_nothing(tmp_path: Path) -> None:
    with BoundaryStore((4, 3, 2), torch.float32, CPU, 0, tmp_path) as store:
        values = torch.arange(24.0).view(4, 3, 2)
        store.write(0, slice(0, 4), values)
        store.read_ahead(0, slice(2, 4))
        store.read_ahead(7, slice(0, 4))  # one that is not there
        assert torch.equal(store.read(0, slice(2, 4)), values[2:])
