"""llm-compressor rounds a result and saves it; transformers read that again, with the scales."""

import json

import torch
from cells import Case, logits_of, main, near
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

#: Columns that a scale of W4A16 is for.
GROUP = 128


def compressed(case: Case, scheme: str, tolerance: float) -> str:
    model = case.load()
    before = logits_of(model)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    uneven = [name for name, part in linears.items() if part.in_features % GROUP and name != "lm_head"]
    left_out = uneven if scheme == "W4A16" else []
    assert len(left_out) < len(linears) - 1, (
        f"groups of {GROUP} divide the inputs of none of {len(linears) - 1} linears"
    )
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", *left_out])
    oneshot(model=model, recipe=recipe, tokenizer=case.tokenizer(), trust_remote_code_model=True)
    saved = case.scratch / "saved"
    model.save_pretrained(saved, save_compressed=True)
    assert "quantization_config" in json.loads((saved / "config.json").read_text())
    again = case.load(saved)
    found = near(logits_of(again), before, tolerance)
    assert any("scale" in name for name, _ in again.named_parameters()), "no scales were read"
    return f"{found}; {len(left_out)} left out" if scheme == "W4A16" else found


if __name__ == "__main__":
    main(
        {
            "llmc_fp8": lambda case: compressed(case, "FP8_DYNAMIC", 0.2),
            "llmc_w8a8": lambda case: compressed(case, "W8A8", 0.1),
            "llmc_w4a16": lambda case: compressed(case, "W4A16", 0.4),
        }
    )
