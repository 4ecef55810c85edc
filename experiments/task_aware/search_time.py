"""How long the search takes for real shapes, with made-up statistics: spectra and gains that fall as a power.

    python experiments/task_aware/search_time.py

Times the method's own search (`surgeon.division.find`): budgets of parameters alone, and with the KV cache, with
couplings.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

from layer_surgery.calibration.couplings import Couplings
from layer_surgery.calibration.statistics import Statistics
from layer_surgery.calibration.units import Feeding, UnitOrder, Units
from layer_surgery.checkpoint.architectures import ARCHITECTURES
from layer_surgery.config import BudgetConfig, SearchConfig
from layer_surgery.surgeon import LayerShape, ModelShape, plan_to_search
from layer_surgery.surgeon.division import find
from layer_surgery.surgeon.resources import CACHE, Pricing

#: Layers, hidden size, MLP width, key/value heads, queries of each, width of a head, vocabulary.
SHAPES = {
    "12 layers of 256 / 688": (12, 256, 688, 2, 2, 64, 4096),
    "7B: 32 layers of 4,096 / 11,008": (32, 4096, 11008, 32, 1, 128, 32000),
    "70B: 80 layers of 8,192 / 28,672": (80, 8192, 28672, 8, 8, 128, 128256),
}


def made_up(name: str) -> tuple[ModelShape, Statistics]:
    """Return the shape of a model and statistics of it."""
    depth, hidden, width, kv, group, head, vocabulary = SHAPES[name]
    rng = np.random.default_rng(0)
    sizes = {
        "self_attn.q_proj": (kv * group * head, hidden),
        "self_attn.k_proj": (kv * head, hidden),
        "self_attn.v_proj": (kv * head, hidden),
        "self_attn.o_proj": (hidden, kv * group * head),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    channels = Units("mlp.down_proj", {"mlp.gate_proj": Feeding(), "mlp.up_proj": Feeding()}, width, 1, 3 * hidden)
    columns = group * head
    feeding = {
        "self_attn.q_proj": Feeding(columns),
        "self_attn.k_proj": Feeding(head),
        "self_attn.v_proj": Feeding(head),
    }
    heads = Units("self_attn.o_proj", feeding, kv, columns, 2 * hidden * (columns + head))
    parameters = sum(out * in_ for out, in_ in sizes.values()) + 2 * hidden
    layer = LayerShape(linears=sizes, parameters=parameters, channels=channels, heads=heads)
    shape = ModelShape(
        layers=[layer] * depth, parameters=depth * parameters + hidden * (2 * vocabulary + 1), hidden_size=hidden
    )
    found = Statistics(components=None, loss_scale=1.0)  # type: ignore[arg-type]  # nothing is carried out
    for index in range(depth):
        scale = 0.1 * rng.uniform(0.5, 2.0)

        def falling(count: int, scale: float = scale) -> np.ndarray[Any, Any]:
            return scale / (1.0 + np.arange(count)) ** rng.uniform(0.5, 1.0)

        found.sizes[index] = sizes
        found.values[index] = {each: falling(min(size)).tolist() for each, size in sizes.items()}
        found.ranks[index] = {each: out * in_ // (out + in_) for each, (out, in_) in sizes.items()}
        for orders, units in ((found.channels, channels), (found.heads, heads)):
            gains = 0.5 * falling(units.count) ** 2
            orders[index] = UnitOrder(list(range(units.count)), gains.tolist())
    parts = [f"{index} {part}" for index in range(depth) for part in ("attention", "mlp")]
    errors = rng.normal(size=(len(parts), 400)) + 0.7 * rng.normal(size=(1, 400))
    found.couplings = Couplings(parts=parts, part_matrix=(errors @ errors.T).tolist())
    return shape, found


def main() -> None:
    """Time every shape."""
    rows = []
    for name in SHAPES:
        shape, found = made_up(name)
        depth = len(shape.layers)
        per_layer = 2 * 2 * shape.layers[0].linears["self_attn.k_proj"][0]
        for share, cache_share in ((0.8, None), (0.5, None), (0.8, 0.7)):
            pricing = Pricing(totals={CACHE: depth * per_layer}, cache_bytes=[per_layer] * depth, placeholder=4)
            bounds = {} if cache_share is None else {CACHE: cache_share * depth * per_layer}
            plan = plan_to_search(shape, range(depth), BudgetConfig(target_parameters=share), "mix", bounds)
            start = time.process_time()
            result = find(plan, shape, ARCHITECTURES["llama"], SearchConfig(), pricing, found)
            row = {
                "shape": name,
                "target_parameters": share,
                "target_kv_cache": cache_share,
                "cpu_seconds": round(time.process_time() - start, 2),
                "cost": result.cost,
                "gap": result.gap,
                "parameters": result.prices["parameters"] / shape.parameters,
            }
            rows.append(row)
            print(row, flush=True)
    write_report(ROOT / "reports" / "task_aware" / "search_time.json", {"rows": rows})


if __name__ == "__main__":
    main()
