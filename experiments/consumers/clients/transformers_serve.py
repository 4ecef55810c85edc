"""`transformers serve` answers one request of the OpenAI client."""

from cells import Case, main
from servers import ask
from transformers.cli.transformers import main as transformers


def server(case: Case) -> str:
    arguments = ["transformers", "serve", case.directory, "--trust-remote-code", "--dtype", "float32"]
    return ask(case, transformers, [*arguments, "--device", "cpu"])


if __name__ == "__main__":
    main({"transformers_serve": server})
