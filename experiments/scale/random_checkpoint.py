"""Random checkpoints of a given shape, written shard by shard: memory is that of one tensor."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT

from layer_surgery.checkpoint.conversion import as_stored
from layer_surgery.checkpoint.save import StreamedSafetensors, split_shards
from layer_surgery.checkpoint.tensors import INDEX_FILE, TensorSpec

SHARD_BYTES = 4_000_000_000


class _Shapes:
    """A source that knows the shapes of a model's tensors only, for the names that files give them."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self.specs = specs

    def read(self, names: object, device: torch.device) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def make_checkpoint(
    directory: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> int:
    """Write a random checkpoint of this configuration with the demo's tokenizer; return its bytes of tensors.

    Matrices are normal with a standard deviation of one over the root of their inputs, so that no hidden state grows
    without bound; what has one dimension is one.
    """
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inside = {name: TensorSpec(tuple(tensor.shape), dtype) for name, tensor in model.state_dict().items()}
    specs = dict(as_stored(_Shapes(inside), model).specs)
    directory.mkdir(parents=True)
    generator, shards = torch.Generator().manual_seed(seed), split_shards(specs, SHARD_BYTES)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with StreamedSafetensors(directory / file_name, {name: specs[name] for name in shard}) as file:
            for name in shard:
                file.write(name, _random(specs[name].shape, dtype, generator))
                weight_map[name] = file_name
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, directory)
    return total


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    tensor = torch.empty(shape, dtype=dtype)
    for rows in tensor.split(4096):  # normal numbers in float32, a part of the tensor at a time
        rows.copy_(torch.randn(rows.shape, generator=generator) / shape[-1] ** 0.5)
    return tensor
