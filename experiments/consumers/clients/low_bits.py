"""Weights in 8 and 4 bits (torchao, bitsandbytes) and quantised KV caches (quanto, HQQ), all on the CPU."""

import torch
from cells import TOKEN_IDS, Case, greedy, logits_of, main, near
from transformers import BitsAndBytesConfig, TorchAoConfig


def uneven(model: torch.nn.Module, inputs: int, outputs: int) -> list[str]:
    """Return the linears whose sides are no multiples of these."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name, linear in linears if linear.in_features % inputs or linear.out_features % outputs]


def rounded(case: Case, settings: object, tolerance: float) -> str:
    return near(logits_of(case.load(quantization_config=settings)), logits_of(case.load()), tolerance)


def torchao_int8(case: Case) -> str:
    from torchao.quantization import Int8WeightOnlyConfig

    return rounded(case, TorchAoConfig(Int8WeightOnlyConfig()), 0.1)


def torchao_int4(case: Case) -> str:
    """4-bit weights, of every linear that groups of 32 divide."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    left_out = uneven(case.load(), inputs=32, outputs=1)
    settings = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    found = rounded(case, TorchAoConfig(settings, modules_to_not_convert=["lm_head", *left_out]), 0.4)
    return f"{found}; {len(left_out)} left out"


def bitsandbytes_int8(case: Case) -> str:
    return rounded(case, BitsAndBytesConfig(load_in_8bit=True), 0.1)


def bitsandbytes_nf4(case: Case) -> str:
    """4-bit weights, of every linear that bitsandbytes' kernel for AVX-512 takes: its blocks are 64 inputs of a row."""
    left_out = uneven(case.load(), inputs=64, outputs=32)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", *left_out]
    )
    return f"{rounded(case, settings, 0.4)}; {len(left_out)} left out"


def cache(case: Case, backend: str) -> str:
    """Generate with keys and values in 4 bits; how many of 16 tokens are those without."""
    settings = {"backend": backend, "nbits": 4, "q_group_size": 32, "residual_length": 4}
    if backend == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}
    model = case.load()
    found = greedy(model, TOKEN_IDS, cache_implementation="quantized", cache_config=settings)
    return f"{int((found == greedy(model, TOKEN_IDS)).sum())} of {found.numel()} tokens"


if __name__ == "__main__":
    main(
        {
            "torchao_int8": torchao_int8,
            "torchao_int4": torchao_int4,
            "bnb_int8": bitsandbytes_int8,
            "bnb_nf4": bitsandbytes_nf4,
            "cache_quanto": lambda case: cache(case, "quanto"),
            "cache_hqq": lambda case: cache(case, "hqq"),
        }
    )
