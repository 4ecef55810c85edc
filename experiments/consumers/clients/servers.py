"""What the two servers share: a port, a process that answers, and one request through the OpenAI client."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from cells import PROMPTS, Case
from openai import OpenAI

#: Seconds in which a server has to answer.
PATIENCE = 300
TOKENS = 8


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
            raise RuntimeError(lines[-1] if lines else f"the server ended with code {server.returncode}")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"no answer in {PATIENCE} s")


def ask(case: Case, command: list[str]) -> str:
    """Start a server, have it continue a prompt greedily, and compare the text with that of transformers."""
    port, log = free_port(), case.scratch / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        answer = client.completions.create(model=case.directory, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0)
        found = answer.choices[0].text
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    model, tokenizer = case.load(), case.tokenizer()
    given = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**given, do_sample=False, max_new_tokens=TOKENS)[0]
    expected = tokenizer.decode(tokens[given.input_ids.shape[1] :], skip_special_tokens=True)
    assert found.strip() == expected.strip(), f"the text is {found!r}, not {expected!r}"
    return "same text"
