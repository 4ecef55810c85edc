"""What the two servers share: a port, a process that answers, and one request through the OpenAI client."""

import os
import signal
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cells import PROMPTS, Case
from openai import OpenAI

#: Seconds in which a server has to answer.
PATIENCE = 400
TOKENS = 8


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(program: Callable[[], object], arguments: list[str], log: Path) -> int:
    """Run a command line's entry point in a fork, which has everything imported, and return the process."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = arguments
    try:
        program()
    except BaseException:  # the log is what the parent reads
        traceback.print_exc()
    os._exit(1)


def wait_for(server: int, url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if os.waitpid(server, os.WNOHANG)[0]:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
            raise RuntimeError(lines[-1] if lines else "the server ended without a word")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"no answer in {PATIENCE} s")


def ask(case: Case, program: Callable[[], object], arguments: list[str]) -> str:
    """Start a server, have it continue a prompt greedily, and compare the text with that of transformers."""
    port, log = free_port(), case.scratch / "server.log"
    server = start(program, [*arguments, "--port", str(port)], log)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=200, max_retries=0)
        answer = client.completions.create(model=case.directory, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0)
        found = answer.choices[0].text
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace"))
        raise
    finally:
        stop(server)
    model, tokenizer = case.load(), case.tokenizer()
    given = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**given, do_sample=False, max_new_tokens=TOKENS)[0]
    expected = tokenizer.decode(tokens[given.input_ids.shape[1] :], skip_special_tokens=True)
    assert found.strip() == expected.strip(), f"the text is {found!r}, not {expected!r}"
    return "same text"


def stop(server: int) -> None:
    """End a server and the processes that it has started, which are its session."""
    try:
        os.killpg(server, signal.SIGTERM)
        time.sleep(2)
        os.killpg(server, signal.SIGKILL)
    except ProcessLookupError:
        pass
