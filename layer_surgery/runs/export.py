"""A checkpoint with low-rank layers as a plain one of its base architecture: `W = L R` multiplied out.

Written shard by shard and tensor by tensor, so that memory holds one matrix, whatever the size of the model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from layer_surgery.calibration.units import mlp_channels
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.contents import list_files
from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.output import check_not_same, check_output, staged_directory, writing
from layer_surgery.checkpoint.save import check_saved, save_checkpoint, write_json
from layer_surgery.checkpoint.tensors import TensorSource, TensorSpec
from layer_surgery.config import ExportConfig
from layer_surgery.errors import CheckpointError, NumericalError, OutputError
from layer_surgery.machine import provenance
from layer_surgery.progress import Stage
from layer_surgery.records import REPORT_SCHEMA_VERSION, SurgeryReport
from layer_surgery.records.reading import REPORT_FILE, read_json, read_report
from layer_surgery.reporting.publish import write_page_and_card
from layer_surgery.runs.session import Model

_IN, _OUT = f".{IN_FACTOR}", f".{OUT_FACTOR}"


@dataclass(frozen=True, kw_only=True)
class DenseExport:
    """Record of a dense export: `dense_export` in its `surgery.json`."""

    source: str  #: The low-rank checkpoint, as the user named it.
    linears: int  #: How many pairs of factors were multiplied out.
    removed_linears: int  #: Those of them with rank 0 (removed attentions or MLPs), whose weights are zeros now.
    padded_linears: (
        int  #: How many linears (and experts of a layer) with fewer channels or heads were filled up with zeros.
    )
    model_type: str
    layers: int
    dtype: str
    parameters_before: int
    parameters: int
    size_bytes_before: int
    size_bytes: int
    provenance: dict[str, Any]
    output: str | None = None  #: The directory that was written. Not part of `surgery.json`.


def run_export(directory: Model, config: ExportConfig) -> DenseExport:
    """Write the checkpoint in `directory` to `output` with its factors multiplied out, and say what was done.

    Raises `CheckpointError` for a plain checkpoint, `ReportError` for a damaged `surgery.json`, `OutputError` for an
    output that may not be written, and `NumericalError` for a product that is not finite in the checkpoint's dtype.
    """
    if (output := config.output) is None:
        raise OutputError("give --output (a directory for the exported model).")
    check_not_same(directory, output)
    check_output(output, overwrite=config.overwrite)
    low_rank = open_checkpoint(directory)
    if not low_rank.low_rank and not low_rank.narrowed:
        raise CheckpointError(
            f"{directory} is a plain checkpoint (model_type: {low_rank.config.model_type}) without low-rank or "
            "narrowed layers, so there is nothing to export; every tool loads it as it is."
        )
    stored = low_rank.directory / REPORT_FILE if low_rank.directory is not None else None
    report = read_json(stored, REPORT_SCHEMA_VERSION, "repair or remove it") if stored and stored.is_file() else {}
    with staged_directory(output, overwrite=config.overwrite, note=config.ui.note) as staging, writing(output):
        dense = dense_checkpoint(low_rank)
        config.ui.plan([Stage("save", "multiplying factors out")])
        with config.ui.stage("save"):
            save_checkpoint(dense, staging, base=low_rank, progress=config.ui.progress)
            check_saved(staging, dense)
        record = DenseExport(
            source=str(directory),
            linears=len(low_rank.low_rank),
            removed_linears=sum(rank == 0 for rank in low_rank.low_rank.values()),
            padded_linears=len(low_rank.narrowed),
            model_type=dense.config.model_type,
            layers=dense.layer_count,
            dtype=str(dense.dtype).removeprefix("torch."),
            parameters_before=low_rank.parameters,
            parameters=dense.parameters,
            size_bytes_before=low_rank.size_bytes,
            size_bytes=dense.size_bytes,
            provenance=provenance(torch.device("cpu")) | {"command": config.command},
        )
        exported = {name: value for name, value in asdict(record).items() if name != "output"}
        files = {name: asdict(file) for name, file in list_files(staging).items()}
        write_json(staging / REPORT_FILE, {**report, "files": files, "dense_export": exported})
        if report and low_rank.directory is not None:
            measured = read_report(low_rank.directory / REPORT_FILE)
            write_page_and_card(staging, measured, output.name, note=_note(record, measured))
    return replace(record, output=str(output))


def _note(record: DenseExport, report: SurgeryReport) -> str:
    """Say on page and card of an export that they are about another directory."""
    return (
        f"This is a dense export with {record.parameters:,} parameters: a plain checkpoint that computes, within "
        f"rounding, what {Path(record.source).name} does, which has {report.after.parameters:,}. Everything below is "
        "about that one; an export is neither smaller nor faster."
    )


def dense_checkpoint(low_rank: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the factors of every low-rank linear multiplied out when they are read.

    MLPs and attentions with fewer channels or heads are filled up with zeros, which add nothing.
    """
    plain = replace(
        low_rank,
        name=f"{low_rank.name} multiplied out",
        config=AutoConfig.for_model(**low_rank.config_fields),
        low_rank={},
        narrowed={},
        source=MultipliedSource(low_rank.source, low_rank.low_rank),
        model_class=None,
        files=(),
    )
    _check_no_bypass(plain, low_rank.low_rank)
    _check_all_experts(plain, low_rank.narrowed)
    return replace(plain, source=PaddedSource(plain.source, plain, low_rank.narrowed)) if low_rank.narrowed else plain


def _check_no_bypass(plain: Checkpoint, replaced: Iterable[str]) -> None:
    """Raise `CheckpointError` if a linear map stands in the place of a whole MLP: no MLP computes the same."""
    maps = [name for name in replaced if any(True for _ in plain.skeleton.get_submodule(name).children())]
    if maps:
        raise CheckpointError(
            f"{len(maps)} MLPs (the first is '{maps[0]}') are bypassed by a linear map, which the plain architecture "
            "cannot compute; compress the original again without bypass in --components."
        )


def _check_all_experts(plain: Checkpoint, narrowed: Mapping[str, tuple[int, int]]) -> None:
    """Raise `CheckpointError` if a layer has fewer experts: a router would choose those that are filled up too."""
    for index, layer in enumerate(plain.layers):
        experts = experts_of(layer)
        name = f"{plain.layer_prefix(index)}{experts.module}" if experts is not None else ""
        if experts is not None and narrowed.get(name, (experts.number, 0))[0] < experts.number:
            raise CheckpointError(
                f"layer {index} has fewer experts than the plain architecture, whose router would choose among all of "
                "them; compress the original again with --uniform, which gives a plain checkpoint, or without routed "
                "in --components."
            )


class MultipliedSource:
    """Tensors of another source, in which the two factors of every named linear are one weight [out, in].

    The product is computed in float64 and rounded once. Rank 0 gives zeros, exactly what a removed linear stands for;
    its bias, like all else, is passed on.
    """

    def __init__(self, source: TensorSource, linears: Iterable[str]) -> None:
        self._source, self._linear_of = source, {f"{linear}.weight": linear for linear in linears}
        self.specs: dict[str, TensorSpec] = {}
        factors = {f"{linear}{part}" for linear in self._linear_of.values() for part in (_IN, _OUT)}
        for name, spec in source.specs.items():
            if name not in factors:
                self.specs[name] = spec
            elif name.endswith(_OUT):
                linear = name.removesuffix(_OUT)
                shape = (spec.shape[0], source.specs[linear + _IN].shape[1])
                self.specs[f"{linear}.weight"] = TensorSpec(shape, spec.dtype)

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        names = list(names)
        plain = [name for name in names if name not in self._linear_of]
        tensors = self._source.read(plain, device) if plain else {}
        tensors |= {name: self._product(name, device) for name in names if name in self._linear_of}
        return tensors

    def _product(self, name: str, device: torch.device) -> Tensor:
        linear = self._linear_of[name]
        factors = self._source.read([linear + _OUT, linear + _IN], device)
        product = factors[linear + _OUT].double() @ factors[linear + _IN].double()
        weight = product.to(self.specs[name].dtype)
        if not torch.isfinite(weight).all():
            raise NumericalError(f"the product of the factors of '{linear}' is not finite in {weight.dtype}.")
        return weight


class PaddedSource:
    """Tensors of another source, in which linears and experts with fewer channels or heads have all again, of zeros."""

    def __init__(self, source: TensorSource, plain: Checkpoint, narrowed: Iterable[str]) -> None:
        """Fill up the `narrowed` linears to the sizes that they have in the skeleton of `plain`."""
        self._source, self.specs = source, dict(source.specs)
        self._parts: dict[str, tuple[int, int]] = {}
        # By tensor: a dimension, and the equal parts, one behind the other along it, that are filled up each.
        shapes = {name: tuple(parameter.shape) for name, parameter in plain.skeleton.named_parameters()}
        parts = {
            f"{plain.layer_prefix(index)}{name}": feeding.parts
            for index, layer in enumerate(plain.layers)
            if (channels := mlp_channels(layer, plain.architecture)) is not None
            for name, feeding in channels.feeding.items()
        }
        experts = {
            f"{plain.layer_prefix(index)}{found.module}": found
            for index, layer in enumerate(plain.layers)
            if (found := experts_of(layer)) is not None
        }
        for module in narrowed:
            places = {f"{module}.{name}": (0, parts.get(module, 1)) for name in ("weight", "bias")}
            if module in experts:
                each = experts[module]
                places = {
                    f"{module}.{name}": (dim, count if each.concatenated else 1)
                    for name, (dim, count) in each.channel_dims.items()
                }
            for name, place in places.items():
                if name in shapes and self.specs[name].shape != shapes[name]:
                    self.specs[name] = TensorSpec(shapes[name], self.specs[name].dtype)
                    self._parts[name] = place

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        tensors = self._source.read(names, device)
        return {name: self._padded(name, tensor) if name in self._parts else tensor for name, tensor in tensors.items()}

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        (dim, parts), whole = self._parts[name], tensor.new_zeros(self.specs[name].shape)
        places = zip(tensor.chunk(parts, dim), whole.chunk(parts, dim), strict=True)
        for part, place in places:
            place[tuple(slice(size) for size in part.shape)] = part
        return whole
