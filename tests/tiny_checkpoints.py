"""Tiny checkpoints with a tokenizer, text to calibrate on, and the command line in this process or in its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layer_surgery.cli.main import main
from layer_surgery.disk.signals import ENDING

#: Rows of the embedding; the tiny tokenizer has fewer ids.
VOCABULARY = 320
REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "experiments" / "demo" / "checkpoint"
CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
WORDS = ("the quick brown fox jumps over the lazy dog", "the answer is the other thing", "one two three four")

#: A task of lm-eval whose data are on the hub, where there is none of this name.
HUB_TASK = """
task: from_hub
dataset_path: nobody/nothing-of-this-name
test_split: test
doc_to_text: "x"
doc_to_target: "y"
"""

#: Put before a script, it makes this package impossible to import, wherever it is installed.
WITHOUT_LAYER_SURGERY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "layer_surgery":
            raise ImportError("layer_surgery is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import layer_surgery
except ImportError:
    pass
else:
    raise SystemExit("layer_surgery could be imported")
"""


def model_with_vocabulary(model_type: str = "llama", **fields: Any) -> PreTrainedModel:
    """Return a tiny model in float32 whose embedding has a row for every id of the tiny tokenizer."""
    return tiny_model(model_type, **{"vocab_size": VOCABULARY, "dtype": torch.float32} | fields)


def saved_model(
    directory: Path,
    model_type: str = "llama",
    *,
    model: PreTrainedModel | None = None,
    max_shard_size: str = "1GB",
    **fields: Any,
) -> Path:
    """Save a tiny model with tokenizer, chat template and generation configuration, and return its directory."""
    model = model or model_with_vocabulary(model_type, **fields)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(directory)
    return directory


def text_file(path: Path, *, lines: int = 60, seed: int = 0) -> Path:
    """Write text that the tiny tokenizer makes about ten tokens of for every line."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(WORDS), (lines,), generator=generator).tolist()
    path.write_text("\n".join(f"{WORDS[choice]} {number}" for number, choice in enumerate(order)), encoding="utf-8")
    return path


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return every tensor in the safetensors files of a directory, by the library's own reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file in place; None removes one."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in data.items() if name not in changes or value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def strict_json(text: str) -> Any:
    """Read JSON that holds no NaN and no Infinity, which are Python's own additions to it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def listing(directory: Path) -> dict[str, str]:
    """Return every path below a directory, hidden ones too, with the hash of what it holds."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


def logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(token_ids, use_cache=False).logits
    return result


def load_stock(directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load with transformers alone; return the model and what the loader says about its keys."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    return model, info


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


class CommandLine:
    """Runs `layer-surgery` through its own `main()` in this process, so that torch is imported once for all tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path | float) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["layer-surgery", *map(str, arguments)])
        self._capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in ENDING}
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = self._capsys.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)


def environment(home: Path) -> dict[str, str]:
    """Return variables for a process of its own: offline, light, and with its own place for remote code."""
    return os.environ | {
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_process(*arguments: str | Path, home: Path, timeout: float = 120) -> Outcome:
    """Run `layer-surgery` as a process of its own."""
    return finished([sys.executable, "-m", "layer_surgery", *map(str, arguments)], home, timeout)


def run_stock_script(script: str, *arguments: str | Path, home: Path, timeout: float = 120) -> Any:
    """Run a script where `layer_surgery` cannot be imported; return the JSON that it prints as its last line."""
    done = finished([sys.executable, "-I", "-c", WITHOUT_LAYER_SURGERY + script, *map(str, arguments)], home, timeout)
    assert done.code == 0, done.err[-3000:]
    return json.loads(done.out.splitlines()[-1])


def finished(command: list[str], home: Path, timeout: float) -> Outcome:
    """Run a process to its end, in `home` and with `environment`."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=environment(home), cwd=home, timeout=timeout, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def interrupt(process: subprocess.Popen[str], number: int, *, timeout: float = 60) -> Outcome:
    """Send a signal to a process and wait for its end."""
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(Exception):
            process.communicate(timeout=5)
        raise
    return Outcome(process.returncode, out, err)


def assert_refused(outcome: Outcome, *expected: str, code: int = 2) -> None:
    """Check that a command ended with one sentence that holds every `expected` part, after at most some notes."""
    assert outcome.code == code, outcome.err
    *notes, message = outcome.error_lines
    assert message.startswith("error: "), outcome.err
    assert all(
        note.startswith(("calibration: ", "refit: ", "evaluation: ", "healing: ", "stage ")) for note in notes
    ), outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for part in expected:
        assert part in message, f"{part!r} is not in {message!r}"
