"""Sizes of models that no test could hold, for what is counted from sizes alone."""

from __future__ import annotations

from typing import Any

import torch

from layer_surgery.runs.foresight.sizes import LayerSizes, Sizes


def llama_7b(**settings: Any) -> Sizes:
    """Two layers of Llama-7B."""
    linears = dict.fromkeys(("q", "k", "v", "o"), (4096, 4096))
    linears |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    parameters = sum(out * in_ for out, in_ in linears.values())
    groups = (("q", "k", "v"), ("gate", "up"), ("o",), ("down",))
    layer = LayerSizes(
        parameters=parameters, largest=11008 * 4096, linears=linears, groups=groups, units={"down": 1}, experts=None
    )
    known: dict[str, Any] = {"dtype": torch.float32, "stored_itemsize": 2, "batch_size": 8, "length": 256}
    known |= {"calibration": 128, "general": 0, "texts": ((40, 256),), "decomposition": "auto"}
    known |= {
        "resident_bytes": 1 << 29,
        "boundary_bytes": 1 << 29,
        "ahead_bytes": 0,
        "hidden": 4096,
        "vocabulary": 32000,
    }
    return Sizes(layers=(layer, layer), outside=2 * 32000 * 4096, **known | settings)
