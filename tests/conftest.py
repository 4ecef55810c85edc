"""What holds for all tests (offline, one thread each, costs counted once a model), and what most of them share."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch
from tiny_checkpoints import CommandLine, saved_model, text_file

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.costs import TokenCosts
from layer_surgery.runs import evaluator

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def _costs_are_counted_once_a_model() -> Iterator[None]:
    """Counting them takes most of a small evaluation, and depends on the configuration only."""
    count = evaluator.token_costs
    known: dict[Any, TokenCosts] = {}

    def remembered(checkpoint: Checkpoint, context: int) -> TokenCosts:
        fields = {name: value for name, value in checkpoint.config.to_dict().items() if name != "_name_or_path"}
        key = (str(fields), str(checkpoint.low_rank), checkpoint.dtype, checkpoint.model_class, context)
        if key not in known:
            known[key] = count(checkpoint, context)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "token_costs", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_sent() -> Iterator[None]:
    """No test reaches for another machine: sockets to any but this one are refused, and the session then fails.

    Of all that goes through Python's sockets, in this process and its forks; torch.distributed has sockets of its own.
    """
    here = {"localhost", socket.gethostname(), "", None, "::1", "::", "0.0.0.0"}
    reached: list[str] = []
    working = [True]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not working[0] or event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            return
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address  # a text or bytes: a socket of this machine
        host = host.decode(errors="replace") if isinstance(host, bytes) else host
        remote = isinstance(address, tuple) or event == "socket.getaddrinfo"
        if remote and host not in here and not str(host).startswith("127."):
            reached.append(f"{event} {host}")
            raise OSError(errno.ENETUNREACH, "tests are offline", str(host))

    sys.addaudithook(audit)
    yield
    working[0] = False
    assert not reached, f"tests have reached for {sorted(set(reached))}"


@pytest.fixture(scope="session", autouse=True)
def _the_disk_is_not_waited_for() -> Iterator[None]:
    """Each result is on the disk before it gets its name; a thousand of them take minutes. No test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 600 tokens of the tiny tokenizer."""
    return text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with four layers, for tests that change nothing of it."""
    return saved_model(tmp_path_factory.mktemp("model"))
