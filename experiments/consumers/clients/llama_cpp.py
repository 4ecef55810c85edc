"""llama.cpp: its converter makes a GGUF file in float32, and the perplexity of a text is that of transformers.

The converter lies beside the environment, in `llama.cpp`, where `make.sh` puts it.
"""

import math
import subprocess
import sys
from pathlib import Path

import torch
import xllamacpp
from cells import Case, main

CONVERTER = Path(sys.prefix).parent / "llama.cpp"
#: llama.cpp knows pre-tokenizers by a hash, and only published ones; those of the checkpoints here are GPT-2's.
CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""
TEXT = "The harbour lay still in the morning, and nobody was about but the old man with his nets."
#: Tokens of the text before the first that counts.
SKIPPED = 4


def convert(case: Case) -> Path:
    file = case.scratch / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(CONVERTER), case.directory, "--outtype", "f32"]
    done = subprocess.run([*command, "--outfile", str(file)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        raise RuntimeError((errors or done.stderr.splitlines())[-1])
    return file


def gguf(case: Case) -> str:
    """Ask for the whole distribution behind each beginning of the text, as the server's interface allows."""
    file = convert(case)
    tokens = case.tokenizer()(TEXT).input_ids
    with torch.no_grad():
        logs = case.load()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    settings.warmup = False
    server = xllamacpp.Server(settings)
    theirs, ours = 0.0, 0.0
    for place in range(SKIPPED, len(tokens)):
        request = {"prompt": tokens[:place], "n_predict": 1, "n_probs": logs.shape[1], "temperature": 0.0}
        answer = server.handle_completions(request)
        found = {
            entry["id"]: entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        }
        theirs -= found[tokens[place]]
        ours -= float(logs[place - 1, tokens[place]])
    count = len(tokens) - SKIPPED
    perplexities = [math.exp(total / count) for total in (ours, theirs)]
    words = f"{perplexities[1]:.2f} and {perplexities[0]:.2f}"
    assert abs(perplexities[1] / perplexities[0] - 1) < 0.01, f"perplexity is {words}"
    return words


if __name__ == "__main__":
    main({"gguf": gguf})
