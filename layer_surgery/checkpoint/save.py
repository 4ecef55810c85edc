"""Write a checkpoint into an empty directory, shard by shard, tensor by tensor."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from layer_surgery.checkpoint import modeling_layer_surgery
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.contents import CODE_FILE, TEMPLATES_FOLDER
from layer_surgery.checkpoint.conversion import as_stored
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.tensors import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE, SafetensorsSource, TensorSpec
from layer_surgery.disk.reading import read_json
from layer_surgery.errors import CheckpointError, LayerSurgeryError, NumericalError
from layer_surgery.machine import release_freed_memory
from layer_surgery.progress import Progress, no_progress

#: Largest shard when the original was not in files (transformers' own default).
DEFAULT_SHARD_BYTES = 50 * 1000**3
#: Files of the original that belong to its tokenizer, its generation or its licence, and travel with it.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*"),
)
#: Classes of tokenizers, without `Fast`, that have nothing of their own beside `tokenizer.json`.
_GENERIC_TOKENIZERS = ("PreTrainedTokenizer", "TokenizersBackend")
#: Freed memory goes back to the system after tensors of at least this size.
_LARGE_BYTES = 1 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def check_free_space(directory: Path, needed: int) -> None:
    """Raise `LayerSurgeryError` if a checkpoint of `needed` bytes does not fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise LayerSurgeryError(
            f"the checkpoint takes {needed:,} bytes, but the disk of --output has {free:,} free; make room or choose "
            "another --output. Nothing was written."
        )


def save_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    base: Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write weights, configuration and what travels with them into an empty `directory`.

    Shards are as large as those of `base`. A checkpoint with low-rank layers gets the modelling file beside it.
    Raises `LayerSurgeryError` if it does not fit on the disk, `OSError` if a write fails.
    """
    check_free_space(directory, checkpoint.size_bytes)
    write_shards(checkpoint, directory, shard_bytes=_shard_bytes(base), progress=progress)
    fields = checkpoint.config_fields
    if checkpoint.low_rank or checkpoint.narrowed:
        fields = modeling_layer_surgery.nested_config(fields, checkpoint.low_rank, checkpoint.narrowed)
        shutil.copyfile(CODE_FILE, directory / CODE_FILE.name)
    write_json(directory / "config.json", PreTrainedConfig._encode_special_floats(fields))
    if checkpoint.embedder is not None:
        checkpoint.embedder.save(directory)
    _copy_companions(base, directory, tokenizer)
    if checkpoint.low_rank or checkpoint.narrowed:
        _name_tokenizer_class(base, directory, tokenizer)


def check_saved(directory: Path, checkpoint: Checkpoint) -> None:
    """Open what was written, which checks the name and shape of every tensor, and count its parameters.

    Raises `CheckpointError` unless it is the `checkpoint` that was to be written.
    """
    saved = open_checkpoint(directory, trust_remote_code=checkpoint.trust_remote_code)
    kept = (saved.parameters, saved.low_rank, saved.narrowed)
    if kept != (checkpoint.parameters, checkpoint.low_rank, checkpoint.narrowed):
        raise CheckpointError(
            f"what was written to {directory} is not what was to be written; this is a bug, report it."
        )


def write_shards(checkpoint: Checkpoint, directory: Path, *, shard_bytes: int, progress: Progress) -> None:
    """Write all tensors in files of at most `shard_bytes` (a larger tensor gets a file of its own), with an index."""
    source = as_stored(checkpoint.source, checkpoint.skeleton)
    specs = source.specs
    shards = split_shards(specs, shard_bytes)
    names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    with progress("writing", len(specs)) as advance:
        for file_name, shard in zip(names, shards, strict=True):
            with StreamedSafetensors(directory / file_name, {name: specs[name] for name in shard}) as file:
                for name in shard:
                    tensor = source.read([name], torch.device("cpu"))[name]
                    if tensor.dtype.itemsize > 1 and not torch.isfinite(tensor).all():  # one-byte dtypes have no check
                        raise NumericalError(
                            f"tensor '{name}' of {checkpoint.name} (layers numbered as there) holds NaN or Inf; the "
                            "checkpoint is damaged."
                        )
                    file.write(name, tensor)
                    if tensor.nbytes >= _LARGE_BYTES:
                        release_freed_memory()
                    advance()
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": checkpoint.size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)


def split_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Return the names in their order, cut where the next tensor would take a shard above `shard_bytes`."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.nbytes
    return shards


class StreamedSafetensors:
    """Writes one safetensors file tensor by tensor; the library's own writer wants all of them in memory at once.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the bytes of the tensors).
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, tuple[int, TensorSpec]] = {}
        # Widest dtypes first keeps every tensor aligned to its own size.
        offset = 0
        for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
            spec = specs[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            self._offsets[name] = (offset, spec)
            offset += spec.nbytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self._missing = set(specs)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, exactly of the shape and dtype that was announced."""
        offset, spec = self._offsets[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise LayerSurgeryError(f"tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, announced as {spec}.")
        self._file.seek(self._data_start + offset)
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # On the disk before it is renamed into place: a power cut must not leave an empty file there.
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._missing:
            raise LayerSurgeryError(f"{len(self._missing)} tensors were announced and never written.")


def _shard_bytes(base: Checkpoint) -> int:
    """Return the size of the original's largest shard, in tensor bytes."""
    if not base.files:
        return DEFAULT_SHARD_BYTES
    if len(base.files) == 1:
        return max(base.size_bytes, DEFAULT_SHARD_BYTES)  # one file stays one file
    return max(sum(spec.nbytes for spec in SafetensorsSource([path]).specs.values()) for path in base.files)


def _copy_companions(base: Checkpoint, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy tokenizer, chat template, generation configuration and licence; for a model in memory, save them."""
    if base.directory is not None:
        patterns = COMPANIONS + (("*.py",) if base.config_fields.get("auto_map") else ())
        outer = base.embedder.root if base.embedder is not None else None
        for folder in dict.fromkeys([outer or base.directory, base.directory]):
            for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
                if path.is_file() and path.name != CODE_FILE.name:
                    shutil.copyfile(path, directory / path.name)
        # Of the folder only what belongs there: a pipe or a device would be copied for ever.
        templates = [path for path in sorted((base.directory / TEMPLATES_FOLDER).glob("*.jinja")) if path.is_file()]
        if templates:
            (directory / TEMPLATES_FOLDER).mkdir()
        for path in templates:
            shutil.copyfile(path, directory / TEMPLATES_FOLDER / path.name)
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if isinstance(base.generation_config, GenerationConfig):
        base.generation_config.save_pretrained(directory)


def _name_tokenizer_class(base: Checkpoint, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Have `tokenizer_config.json` say which class the tokenizer that was copied from `base` is of.

    Where it does not, or says what is known to be wrong, transformers goes by the type of the model; of a result with
    the modelling file that is another one, and special tokens that are the class's own would be missing.
    """
    if tokenizer is None or base.directory is None or tokenizer.name_or_path != str(base.directory):
        return
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    found = type(tokenizer).__name__.removesuffix("Fast")
    said = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    generic = found in _GENERIC_TOKENIZERS
    if settings.get("auto_map") or found == said or (generic and said in ("", *_GENERIC_TOKENIZERS)):
        return
    write_json(file, settings | {"tokenizer_class": "PreTrainedTokenizerFast" if generic else found})


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file for people to read too; `ValueError` for numbers that JSON does not have."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
