"""Chats rendered by a tokenizer's chat template, which is a program that comes with the checkpoint.

The sandbox of Jinja keeps it from files and attributes, not from computing for ever or filling memory, and nothing can
stop it within a process: a single power of two numbers may take years. So it runs in a fork with limits of its own.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from layer_surgery.disk.signals import ENDING

#: Seconds of processor time, and bytes, that one rendering may take.
SECONDS, MEMORY = 20, 4 << 30
Request = tuple[Sequence[dict[str, str]], bool]
"""Messages, and whether the beginning of an answer is put behind them."""


def rendered(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> list[tuple[str, str]]:
    """Return the text of each request, and "" or why there is none; fewer if one of them does not come to an end.

    The first that is missing has then used up what one may take.
    """
    if not requests:
        return []
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, for forks of what has threads
        child = os.fork()  # which runs the template and nothing that other threads may have locked
    if child == 0:
        _work(tokenizer, requests, read, write)
    os.close(write)
    try:
        with open(read, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [(text, problem) for text, problem in map(json.loads, lines)]


def _work(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], read: int, write: int) -> None:
    """Render in the fork, and end it."""
    try:
        os.close(read)
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with open(write, "w", encoding="utf-8") as file:
            for messages, generate in requests:
                _, hard = resource.getrlimit(resource.RLIMIT_CPU)
                resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, hard))
                file.write(json.dumps(_one(tokenizer, messages, generate)) + "\n")
                file.flush()
    finally:
        os._exit(0)


def _one(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generate: bool) -> tuple[str, str]:
    try:
        text = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # a program may fail in any way, by an overflow of the stack too
        return "", " ".join(str(error).split())[:200] or type(error).__name__
    return str(text), ""


def _limit_memory() -> None:
    """Limit what the fork may take beside what it has from its parent, where the system says how much that is."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
