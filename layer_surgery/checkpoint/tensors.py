"""Sources of tensors: files, a model in memory, or a mixture. Read by name, and only when asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layer_surgery.disk.reading import read_json
from layer_surgery.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: dtype names in a safetensors header, both ways.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that can be read one by one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor, known without reading any."""
        ...

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Return the named tensors as stored, on `device`; the caller must not write to them."""
        ...


class SafetensorsSource:
    """Tensors in one or several safetensors files. Each read maps the files, copies, and unmaps them again,
    so that resident memory never holds more than what was asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for path in files:
            for name, spec in _read_header(path).items():
                if name in self.specs:
                    raise CheckpointError(f"tensor '{name}' is in two files: {self._file_of[name]} and {path}.")
                self._file_of[name], self.specs[name] = path, spec

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in wanted:
                        # copy=True: a view would keep the whole file mapped, and resident once touched.
                        tensors[name] = file.get_tensor(name).to(device, copy=True)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} has gone or changed since it was opened ({error}); leave it alone while a run works."
                ) from error
        return tensors


class StateDictSource:
    """Tensors that are in memory already (a user's model); they are shared, not copied."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        return {name: self._tensors[name].to(device) for name in names}


class RenamedSource:
    """Tensors of several sources under new names: `mapping[new name] = (source, name there)`."""

    def __init__(self, mapping: Mapping[str, tuple[TensorSource, str]]) -> None:
        self._mapping = dict(mapping)
        self.specs = {new: source.specs[old] for new, (source, old) in self._mapping.items()}

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        # Group by source, so that a file is opened once and not once for every tensor.
        groups: dict[int, tuple[TensorSource, dict[str, str]]] = {}
        for new in names:
            source, old = self._mapping[new]
            groups.setdefault(id(source), (source, {}))[1][new] = old
        tensors: dict[str, Tensor] = {}
        for source, old_of in groups.values():
            read = source.read(dict.fromkeys(old_of.values()), device)
            tensors |= {new: read[old] for new, old in old_of.items()}
        return tensors


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint directory, through its index if it has one.

    Raises `CheckpointError` for a pickle-only checkpoint, a missing shard or a damaged index.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if index.is_file():
        try:
            weight_map = read_json(index)["weight_map"]
            shards = sorted(set(map(str, weight_map.values())))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); download the checkpoint again.") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names '{shard}', which is not a file beside it.")
            if not (directory / shard).is_file():
                raise CheckpointError(f"the shard {shard}, which {INDEX_FILE} lists, is missing in {directory}.")
        return [directory / shard for shard in shards]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights as pickle only ({pickles[0]}), which can run code when opened and is never "
            "read here; convert it once, in a place that you trust, with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise CheckpointError(f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}; is it a model directory?")


def _read_header(path: Path) -> dict[str, TensorSpec]:
    """Return the specs of all tensors in a file; a truncated or damaged file is a `CheckpointError`."""
    specs: dict[str, TensorSpec] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                view = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"tensor '{name}' in {path} has the unsupported dtype {view.get_dtype()}.")
                specs[name] = TensorSpec(tuple(view.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or download the checkpoint again."
        ) from error
    return specs
