"""Weights of decoder layers in 8 or 4 bits, by torchao's round-to-nearest, with the bytes that they take.

8 bits: symmetric, a scale for each row (torchao's `Int8WeightOnlyConfig`). 4 bits: a scale and a zero point for each
group of 32 inputs (`IntxWeightOnlyConfig`, asymmetric, which on the demo checkpoint errs by 15 % less than symmetric;
the group is the row where 32 do not divide it). Linears of layers are quantised;
embedding (with the head tied to it), norms and biases stay in 16 bits, as torchao does it.

Evaluated with the dequantised weights, in float32: what weight-only kernels compute, but for their rounding. Bytes are
those of the packed form: the integers at their bits, and scales and zero points as torchao makes them (zero points only
where they are not all zero); 2 for each other parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.records import LayerPlan, SurgeryPlan

from .desk import UnreachableSize

GROUP = 32


def quantised(checkpoint: Checkpoint, bits: int, new_scratch: Callable[[str], Path]) -> tuple[Checkpoint, int]:
    """Return the checkpoint with its layers' linears quantised, and the bytes of the packed form."""
    store = FactorStore(new_scratch("quantised"), torch.float32)
    total = 2 * checkpoint.parameters
    for index, layer in enumerate(checkpoint.layers):
        prefix = checkpoint.layer_prefix(index)
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear) or not module.weight.numel():
                continue
            stored = checkpoint.source.read([f"{prefix}{name}.weight"], torch.device("cpu"))
            weight = next(iter(stored.values()))
            values, size = round_trip(weight, bits)
            total += size - 2 * weight.numel()
            store.write_tensors(index, name, {"weight": values})
    layers = [LayerPlan(index=index, action="keep") for index in range(checkpoint.layer_count)]
    plan = SurgeryPlan(method="quantised", target_layers=len(layers), layers=layers)
    return result_checkpoint(checkpoint, plan, store), total


def round_trip(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """Return a weight [out, in] as its quantised form gives it back, float32, and the bytes of that form."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
        from torchao.quantization.quant_primitives import MappingType
    except ImportError as error:
        raise UnreachableSize("torchao is not installed") from error
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if bits == 8:
        quantize_(linear, Int8WeightOnlyConfig())
    else:
        group = GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]
        quantize_(
            linear,
            IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC
            ),
        )
    packed: Any = linear.weight
    size = packed.qdata.numel() * bits // 8 + packed.scale.numel() * packed.scale.element_size()
    zeros = packed.zero_point
    if zeros is not None and bool((zeros != 0).any()):
        size += zeros.numel() * zeros.element_size()
    return packed.dequantize().float(), size
