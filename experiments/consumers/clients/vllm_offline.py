"""vLLM on the CPU: greedy tokens and log-probabilities of prompts against transformers', in float32."""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from cells import PROMPTS, Case, main
from vllm import LLM, SamplingParams


def offline(case: Case) -> str:
    vllm = LLM(
        case.directory, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4
    )
    found = vllm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0))
    model, tokenizer = case.load(), case.tokenizer()
    largest = 0.0
    for prompt, output in zip(PROMPTS, found, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        ids = given.input_ids[0].tolist()
        expected = model.generate(**given, do_sample=False, max_new_tokens=16)[0][len(ids) :].tolist()
        assert list(output.outputs[0].token_ids) == expected, f"tokens {output.outputs[0].token_ids}, not {expected}"
        with torch.no_grad():
            logs = model(**given).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            difference = output.prompt_logprobs[place][ids[place]].logprob - float(logs[place - 1, ids[place]])
            largest = max(largest, abs(difference))
    assert largest < 1e-3, f"log-probabilities differ by {largest:.1e}"
    return f"{largest:.0e}"


if __name__ == "__main__":
    main({"vllm_offline": offline})
