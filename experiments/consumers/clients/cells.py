"""What the clients share: rows of the table, each in a process of its own that starts with everything imported.

A client is a script with one function for each of its rows. The function gets a `Case`, returns what it measured in a
few words, and raises where the tool did not do its work.

    python CLIENT DIRECTORY [ORIGINAL]     one JSON line at the end, {row: cell}
    python CLIENT --each                   lines [directory, original, row] on stdin, a line for each cell

The second form is what `table.py` uses, since on few cores importing takes longer than most of the work. Every cell is
made in a fork, which may crash or hang without the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# One thread, by the environment: torch's own setting would make a pool of threads, which does not outlive a fork.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch

#: Begins a line of standard output that is a cell; tools print there too.
MARK = "cell: "
#: Seconds after which a cell is given up.
LIMIT = 900


@dataclass(frozen=True)
class Case:
    """A saved directory, the checkpoint it was made from, and a place for files."""

    directory: str
    original: str
    scratch: Path

    def load(self, where: str | Path | None = None, **options: Any) -> Any:
        """Load a directory with transformers alone, by default that of the case in float32."""
        from transformers import AutoModelForCausalLM

        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(where or self.directory, trust_remote_code=True, **options).eval()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=True)


class NothingToDo(Exception):
    """A row is not about such a directory."""


Client = Callable[[Case], str]

TOKEN_IDS = torch.arange(3, 35).view(2, 16)
PROMPTS = ["The harbour master said", "Water boils when"]


@torch.no_grad()
def logits_of(model: Any, token_ids: torch.Tensor = TOKEN_IDS) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits.float()
    return logits


@torch.no_grad()
def greedy(model: Any, token_ids: torch.Tensor, count: int = 8, **options: Any) -> torch.Tensor:
    """Return exactly `count` tokens behind each prompt."""
    fixed = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    tokens: torch.Tensor = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **fixed, **options)
    return tokens[:, token_ids.shape[1] :]


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> str:
    """Compare what a tool computes in float32: largest difference, as a fraction of the largest value."""
    difference = float((found.float() - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise AssertionError(f"the logits differ by {difference:.1e} of the largest")
    return f"{difference:.0e}"


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """Compare logits after weights were rounded: norm of the difference, as a fraction of the norm."""
    difference = float((found.float() - expected).norm() / expected.norm())
    if not difference <= tolerance:
        raise AssertionError(f"the logits differ by {difference:.2f} of their norm")
    return f"{difference:.3f}"


def cell(client: Client, directory: str, original: str) -> dict[str, str]:
    """Return what one row says of a directory: "yes" with a measure, or "no" with the first line of the error."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {"result": "yes", "measure": client(Case(directory, original, Path(folder)))}
    except NothingToDo:
        return {"result": "-"}
    except BaseException as error:  # the reason is the result, and some tools exit
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        line = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
        return {"result": "no", "error": f"{type(error).__name__}: {line[:300]}"}


def forked(client: Client, directory: str, original: str) -> dict[str, str]:
    """Make a cell in a process that ends with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        os.dup2(2, 1)  # whatever the tool prints is for the log
        with os.fdopen(writer, "w") as pipe:
            json.dump(cell(client, directory, original), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        found: dict[str, str] = json.loads(text)
        return found
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"code {status}"
    return {"result": "no", "error": f"took over {LIMIT} s" if ended == "SIGALRM" else f"ended with {ended}"}


def serve(clients: dict[str, Client], requests: TextIO) -> None:
    for line in requests:
        directory, original, row = json.loads(line)
        print(MARK + json.dumps(forked(clients[row], directory, original)), flush=True)


def main(clients: dict[str, Client]) -> None:
    """Run a client's rows as its command line says."""
    if sys.argv[1:] == ["--each"]:
        serve(clients, sys.stdin)
        return
    directory, original = sys.argv[1], sys.argv[-1]
    print(json.dumps({row: forked(client, directory, original) for row, client in clients.items()}))
