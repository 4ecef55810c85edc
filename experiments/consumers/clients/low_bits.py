"""Weights in 8 and 4 bits (torchao, bitsandbytes) and quantised KV caches (quanto, HQQ), all on the CPU."""

import json
import sys
import traceback
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

directory = sys.argv[1]
ids = torch.arange(3, 35).view(2, 16)


def load(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, **{"dtype": torch.float32, **options}
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float()


def difference(model: Any) -> float:
    return round(float((logits(model) - plain).norm() / plain.norm()), 4)


def torchao() -> float:
    from torchao.quantization import Int8WeightOnlyConfig

    return difference(load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())))


def cache(backend: str) -> int:
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    settings = {"backend": backend, "nbits": 4, "q_group_size": 32, "residual_length": 4}
    if backend == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}
    model = load()
    found = model.generate(ids, cache_implementation="quantized", cache_config=settings, **options)
    return int((found == model.generate(ids, **options))[:, ids.shape[1] :].sum())


original = load()
plain = logits(original)
linears = {name: module for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)}
#: Sides that are no multiples of 32, which 4 bits do not take; in the names of models with low-rank layers too.
uneven = [name for name, linear in linears.items() if linear.in_features % 32 or linear.out_features % 32]
tries = {
    "torchao int8": torchao,
    "bitsandbytes int8": lambda: difference(load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))),
    "bitsandbytes nf4": lambda: difference(
        load(
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", *uneven]
            )
        )
    ),
    "bitsandbytes nf4 left out": lambda: f"{len(uneven)} of {len(linears)}",
    "cache, quanto 4 bits: tokens of 16 as without": lambda: cache("quanto"),
    "cache, HQQ 4 bits: tokens of 16 as without": lambda: cache("hqq"),
}
found: dict[str, Any] = {}
for name, attempt in tries.items():
    try:
        found[name] = attempt()
    except Exception as error:
        traceback.print_exc()
        found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
print("\n" + json.dumps(found))
