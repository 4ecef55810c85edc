"""transformers of any version: save what they compute (--write FILE), or compare it with that file (--read FILE)."""

import argparse
import json

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory")
parser.add_argument("--write")
parser.add_argument("--read")
options = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(options.directory, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(3, 27).view(2, 12)
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
if options.write:
    save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, options.write)
if options.read:
    expected, expected_tokens = (load_file(options.read)[name] for name in ("logits", "tokens"))
    found = {"largest_difference": float((logits - expected).abs().max()), "same": torch.equal(tokens, expected_tokens)}
    print("\n" + json.dumps({"transformers": transformers.__version__, **found}))
