"""llm-compressor rounds a result to 8 bits and saves it; transformers read that again, with the scales."""

import json
import sys
import tempfile

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]


def load(where: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, dtype=torch.float32).eval()


ids = torch.arange(3, 35).view(2, 16)
model = load(directory)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    before = model(ids, use_cache=False).logits
with tempfile.TemporaryDirectory() as folder:
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, tokenizer=tokenizer, trust_remote_code_model=True)
    model.save_pretrained(folder, save_compressed=True)
    with open(f"{folder}/config.json") as file:
        assert "quantization_config" in json.load(file)
    again = load(folder)
    with torch.no_grad():
        after = again(ids, use_cache=False).logits
    scales = sum("scale" in name for name, _ in again.named_parameters())
difference = float((after - before).norm() / before.norm())
print("\n" + json.dumps({"difference_of_logits": round(difference, 4), "scales": scales}))
assert difference < 0.1, difference
