"""Removal outright, and plain truncated SVD."""

from __future__ import annotations

import torch

from layer_surgery import low_rank
from layer_surgery.low_rank import Factors
from layer_surgery.records import SurgeryPlan
from layer_surgery.spectra import spectrum_record
from layer_surgery.surgeon.context import METHODS, SurgeryContext


@METHODS.add("remove", summary="remove the layers outright; nothing takes their place (--keep 0)", removes=True)
def remove(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Do nothing to removed layers; factors of rank 0 for what is removed of others."""
    return without_parts(plan, context)


def without_parts(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Write factors of rank 0, [out, 0] and [0, in], for every linear of the plan."""
    for layer in plan.low_rank:
        module = context.model.layers[layer.index]
        for name in layer.ranks:
            out, in_ = module.get_parameter(f"{name}.weight").shape
            context.factors.write(layer.index, {name: Factors(torch.zeros(out, 0), torch.zeros(0, in_))})
    return plan


@METHODS.add("svd", summary="truncated SVD of each weight: the nearest in Frobenius norm; looks at no data")
def svd(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Replace each linear of the low-rank layers by its truncated SVD."""
    with context.progress("truncating", len(plan.low_rank)) as advance:
        for layer in plan.low_rank:
            prefix = context.model.checkpoint.layer_prefix(layer.index)
            for name, rank in layer.ranks.items():
                weight = f"{prefix}{name}.weight"
                spectrum = low_rank.svd(context.model.read_weights([weight])[weight])
                context.factors.write(layer.index, {name: low_rank.truncated(spectrum, rank)})
                context.spectra.append(spectrum_record(layer.index, name, "weight", spectrum.s.tolist(), rank))
            advance()
    return plan
