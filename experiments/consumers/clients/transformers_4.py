"""The last transformers 4 computes what the transformers of this project compute.

The interpreter of the project is in the environment variable PROJECT_PYTHON.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from cells import TOKEN_IDS, Case, greedy, logits_of, main, same
from safetensors.torch import load_file, save_file


def write(case: Case, file: Path) -> None:
    model = case.load()
    found = {"logits": logits_of(model), "tokens": greedy(model, TOKEN_IDS)}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


def stock(case: Case) -> str:
    expected, found = case.scratch / "expected.safetensors", case.scratch / "found.safetensors"
    subprocess.run([os.environ["PROJECT_PYTHON"], __file__, "--write", case.directory, str(expected)], check=True)
    write(case, found)
    theirs, ours = load_file(found), load_file(expected)
    assert torch.equal(theirs["tokens"], ours["tokens"]), "the tokens differ"
    return same(theirs["logits"], ours["logits"])


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(Case(sys.argv[2], sys.argv[2], Path()), Path(sys.argv[3]))
    else:
        main({"transformers_4": stock})
