"""`transformers serve` answers one request of the OpenAI client."""

import sys
from pathlib import Path

from cells import Case, main
from servers import ask


def server(case: Case) -> str:
    command = [str(Path(sys.executable).with_name("transformers")), "serve", case.directory, "--trust-remote-code"]
    return ask(case, [*command, "--dtype", "float32", "--device", "cpu"])


if __name__ == "__main__":
    main({"transformers_serve": server})
