"""Write a checkpoint: shard by shard, tensor by tensor, beside its destination, renamed into place at the end."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.checkpoint import modeling_layer_surgery
from layer_surgery.checkpoint.conversion import as_stored
from layer_surgery.checkpoint.open import Checkpoint, open_checkpoint
from layer_surgery.checkpoint.tensors import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE, SafetensorsSource, TensorSpec
from layer_surgery.errors import CheckpointError, LayerSurgeryError, NumericalError, OutputError
from layer_surgery.machine import release_freed_memory
from layer_surgery.progress import Progress, no_progress
from layer_surgery.records.reading import REPORT_FILE

#: Largest shard when the original was not in files (transformers' own default).
DEFAULT_SHARD_BYTES = 50 * 1000**3
#: Files of the original that belong to its tokenizer, its generation or its licence, and travel with it.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*"),
)
#: Folder of a tokenizer with several chat templates.
TEMPLATES_FOLDER = "additional_chat_templates"
#: What every output has beside its weights, made from the report.
PAGE_FILES = ("report.html", "README.md")
#: Freed memory goes back to the system after tensors of at least this size.
_LARGE_BYTES = 1 << 20
_CODE = Path(modeling_layer_surgery.__file__)
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextmanager
def staged_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory beside `output` that becomes `output` if the block succeeds.

    If it does not, also on Ctrl-C, the directory is removed and `output` is as it was. Raises `OutputError` if
    `output` exists and `overwrite` is not set, or if it cannot be written.
    """
    check_output(output, overwrite=overwrite)
    staging = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    with writable(output, output.parent, staging.mkdir):
        try:
            yield staging
            _rename_into_place(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def writable(output: Path, directory: Path, write: Callable[[], object]) -> Iterator[None]:
    """Make `directory` for an output, and `write` there; folders that hold nothing in the end are gone again on exit.

    Raises `OutputError`, which names `output`, if one of the two cannot be done.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            raise OutputError(
                f"--output {output} cannot be written ({error.strerror}); choose a directory that you may write to."
            ) from error
        yield
    finally:
        for place in made:
            with suppress(OSError):  # holds the output, or what someone else has put there meanwhile
                place.rmdir()


def check_free_space(directory: Path, needed: int) -> None:
    """Raise `LayerSurgeryError` if a checkpoint of `needed` bytes does not fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise LayerSurgeryError(
            f"the checkpoint takes {needed:,} bytes, but {directory.parent} has {free:,} free; make room or choose "
            "another --output. Nothing was written."
        )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` if `output` exists and may not be replaced."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"--output {output} is a file or a link; give the name of a directory.")
    if output.exists() and not overwrite:
        raise OutputError(f"--output {output} exists already; choose another name, or pass --overwrite to replace it.")
    entries = list(output.iterdir()) if output.exists() else []
    foreign = sorted(entry.name for entry in entries if not _is_ours(entry))
    if output in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"--output {output} is the current directory or above it; give a directory of its own.")
    if entries and (foreign or not (output / REPORT_FILE).is_file()):
        why = f"holds {foreign[0]}" if foreign else f"has no {REPORT_FILE}"
        raise OutputError(
            f"--output {output} {why}, so it is not a result of Layer Surgery alone and is not replaced, even with "
            "--overwrite; choose another name."
        )


def check_not_same(model: str | Path | PreTrainedModel, output: Path) -> None:
    """Raise `OutputError` if writing `output` would replace the model that is read."""
    if isinstance(model, PreTrainedModel) or not (output.exists() and Path(model).exists()):
        return
    if output.samefile(model):
        raise OutputError(f"--output {output} is the model itself; give another directory.")
    if output.resolve() in Path(model).resolve().parents:
        raise OutputError(f"--output {output} holds the model, which would be lost; give another directory.")


def _is_ours(entry: Path) -> bool:
    """Return whether an entry of an output directory is one that this module may have written there."""
    if entry.is_dir():
        return entry.name == TEMPLATES_FOLDER
    code = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
    own = (*COMPANIONS, *code, "*.safetensors", INDEX_FILE, "config.json", REPORT_FILE, *PAGE_FILES)
    return any(fnmatch(entry.name, pattern) for pattern in own)


def _rename_into_place(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    output.rename(old)
    try:
        staging.rename(output)
    finally:  # also on Ctrl-C, before or after the renaming
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)


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
    Raises `LayerSurgeryError` if the disk is full or a write fails.
    """
    check_free_space(directory, checkpoint.size_bytes)
    try:
        write_shards(checkpoint, directory, shard_bytes=_shard_bytes(base), progress=progress)
        fields = checkpoint.config_fields
        if checkpoint.low_rank or checkpoint.narrowed:
            fields = modeling_layer_surgery.nested_config(fields, checkpoint.low_rank, checkpoint.narrowed)
            shutil.copyfile(_CODE, directory / _CODE.name)
        write_json(directory / "config.json", PreTrainedConfig._encode_special_floats(fields))
        _copy_companions(base, directory, tokenizer)
    except OSError as error:
        raise LayerSurgeryError(
            f"writing to {directory.parent} failed ({error.strerror}); nothing was left there."
        ) from error


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
        for pattern in patterns:
            for path in sorted(base.directory.glob(pattern)):
                if path.is_file() and path.name != _CODE.name:
                    shutil.copyfile(path, directory / path.name)
        if (base.directory / TEMPLATES_FOLDER).is_dir():
            shutil.copytree(base.directory / TEMPLATES_FOLDER, directory / TEMPLATES_FOLDER)
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if isinstance(base.generation_config, GenerationConfig):
        base.generation_config.save_pretrained(directory)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that there is never half of it, whatever happens meanwhile. Raises `OSError`."""
    staging = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with staging.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before it is renamed: a power cut must not leave an empty file there
        staging.replace(path)
    finally:
        with suppress(OSError):
            staging.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file for people to read too; `ValueError` for numbers that JSON does not have."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
