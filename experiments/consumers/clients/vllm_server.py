"""vLLM's server on the CPU answers one request of the OpenAI client."""

import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"}

from cells import Case, main
from servers import ask


def server(case: Case) -> str:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", case.directory, "--trust-remote-code"]
    return ask(case, [*command, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"])


if __name__ == "__main__":
    main({"vllm_server": server})
