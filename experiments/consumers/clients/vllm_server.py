"""vLLM's server on the CPU answers one request of the OpenAI client."""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"}

from cells import Case, main
from servers import ask
from vllm.entrypoints.cli.main import main as vllm


def server(case: Case) -> str:
    arguments = ["vllm", "serve", case.directory, "--trust-remote-code", "--dtype", "float32", "--enforce-eager"]
    return ask(case, vllm, [*arguments, "--max-model-len", "128", "--max-num-seqs", "4"])


if __name__ == "__main__":
    main({"vllm_server": server})
