"""Tensors by name from files, memory and mixtures: read when asked for, as stored, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layer_surgery.checkpoint.tensors import (
    SAFETENSORS_DTYPES,
    RenamedSource,
    SafetensorsSource,
    StateDictSource,
    TensorSpec,
    checkpoint_files,
)
from layer_surgery.errors import CheckpointError

CPU = torch.device("cpu")


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "c": torch.randint(0, 9, (2, 2), generator=generator),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }


def in_two_files(directory: Path, tensors: dict[str, Tensor]) -> list[Path]:
    """Write every other tensor into each of two files."""
    names = list(tensors)
    files = [directory / "one.safetensors", directory / "two.safetensors"]
    for offset, file in enumerate(files):
        save_file({name: tensors[name] for name in names[offset::2]}, file)
    return files


def test_specs_of_a_file_are_the_tensors_shapes_and_dtypes(tmp_path: Path) -> None:
    tensors = some_tensors()
    source = SafetensorsSource(in_two_files(tmp_path, tensors))
    assert dict(source.specs) == {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def test_specs_know_elements_and_bytes() -> None:
    spec = TensorSpec((3, 4), torch.bfloat16)
    assert (spec.numel, spec.nbytes) == (12, 24)
    assert TensorSpec((), torch.float32).nbytes == 4


def test_tensors_of_several_files_are_read_as_stored(tmp_path: Path) -> None:
    tensors = some_tensors()
    read = SafetensorsSource(in_two_files(tmp_path, tensors)).read(tensors, CPU)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("dtype", [d for d in SAFETENSORS_DTYPES.values() if d != torch.bool], ids=str)
def test_every_known_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"t": torch.tensor([0, 1, 2]).to(dtype)}, tmp_path / "file.safetensors")
    read = SafetensorsSource([tmp_path / "file.safetensors"]).read(["t"], CPU)["t"]
    assert read.dtype == dtype
    assert read.float().tolist() == [0, 1, 2]


def test_writing_to_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(4)}, tmp_path / "file.safetensors")
    source = SafetensorsSource([tmp_path / "file.safetensors"])
    source.read(["t"], CPU)["t"].fill_(7)
    assert source.read(["t"], CPU)["t"].tolist() == [0, 0, 0, 0]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="'same' is in two files"):
        SafetensorsSource([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "file.safetensors"
    save_file(some_tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"file\.safetensors is truncated or damaged"):
        SafetensorsSource([file])


def test_a_model_in_memory_is_shared_and_not_copied() -> None:
    tensors = some_tensors()
    read = StateDictSource(tensors).read(["a"], CPU)["a"]
    assert read.data_ptr() == tensors["a"].data_ptr()


def test_renamed_tensors_come_from_their_own_sources(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "y": torch.full((3,), 2.0)}, tmp_path / "file.safetensors")
    file, memory = SafetensorsSource([tmp_path / "file.safetensors"]), StateDictSource({"x": torch.zeros(1)})
    source = RenamedSource({"p": (file, "y"), "q": (memory, "x"), "r": (file, "x")})
    read = source.read(["r", "q", "p"], CPU)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"p": [2, 2, 2], "q": [0], "r": [1, 1]}
    assert source.specs["p"] == TensorSpec((3,), torch.float32)


def test_one_tensor_may_have_two_new_names(tmp_path: Path) -> None:
    memory = StateDictSource({"x": torch.arange(3.0)})
    read = RenamedSource({"p": (memory, "x"), "q": (memory, "x")}).read(["p", "q"], CPU)
    assert read["p"].tolist() == read["q"].tolist() == [0, 1, 2]


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text("not looked at")
    assert checkpoint_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_an_index_leads_to_its_shards_once_each(tmp_path: Path) -> None:
    (tmp_path / "two").touch()
    (tmp_path / "one").touch()
    index = {"weight_map": {"a": "two", "b": "one", "c": "two"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_files(tmp_path) == [tmp_path / "one", tmp_path / "two"]


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}', "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        checkpoint_files(tmp_path)


def test_an_index_may_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").touch()
    inside = tmp_path / "model"
    inside.mkdir()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        checkpoint_files(inside)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        checkpoint_files(tmp_path)
