"""Checkpoints that are damaged: cut short, bits flipped in headers and data, fields of the configuration changed.

    python experiments/faults/damaged_checkpoints.py [--count 2000] [--output reports/faults/damaged_checkpoints.json]

Each is opened with its tokenizer, walked over once (the self-check of every run) and all its tensors are read, as the
stages of a run do. It is refused with a sentence, or gives what the whole one gives. Accepted and other than that is
silently wrong, but for bits of data that give another finite number, which nothing can tell in a file without a hash,
and for fields of the configuration.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import place_for_faults
from mutations import mutated_bytes, mutated_json, mutated_value
from outcomes import FINE, WRONG, Outcome, options, try_all
from tiny_checkpoints import saved_model

import layer_surgery
from layer_surgery.config import RuntimeConfig
from layer_surgery.runs.session import open_session

WEIGHTS = "model.safetensors"


class Damage:
    """Copies of a checkpoint, each damaged in one way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = {
            "llama": saved_model(folder / "llama"),
            "mixtral": saved_model(folder / "mixtral", "mixtral"),
            "gpt2": saved_model(folder / "gpt2", "gpt2"),
        }
        layer_surgery.compress(
            self.whole["llama"], layers=[1], keep=0.3, method="svd", output=folder / "low-rank", eval_data=None
        )
        self.whole["low-rank"] = folder / "low-rank"
        self.known = {name: self._seen(path) for name, path in self.whole.items()}

    def kinds(self) -> dict[str, Callable[[int], Outcome | None]]:
        return {
            "cut short": self.cut_short,
            "bit of a header": self.bit_of_header,
            "bit of data": self.bit_of_data,
            "configuration": self.configuration,
            "other JSON": self.other_json,
        }

    def cut_short(self, number: int) -> Outcome | None:
        draw, name, copy = self._copy(f"cut short {number}")
        file = copy / draw.choice((WEIGHTS, WEIGHTS, "config.json", "tokenizer.json"))
        content = file.read_bytes()
        most = len(content) if draw.random() < 0.7 else min(64, len(content))
        return self._opened(copy, name, file, content[: draw.randrange(most)])

    def bit_of_header(self, number: int) -> Outcome | None:
        draw, name, copy = self._copy(f"header {number}")
        content = bytearray((copy / WEIGHTS).read_bytes())
        length = 8 + int.from_bytes(content[:8], "little")
        content[draw.randrange(length)] ^= 1 << draw.randrange(8)
        return self._opened(copy, name, copy / WEIGHTS, bytes(content))

    def bit_of_data(self, number: int) -> Outcome | None:
        """One number changed: it must be finite, or be refused."""
        draw, _name, copy = self._copy(f"data {number}")
        content = bytearray((copy / WEIGHTS).read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        at = draw.randrange((len(content) - start) // 4) * 4 + start
        if draw.random() < 0.5:
            content[at : at + 4] = draw.choice((b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"))
        else:
            content[at + draw.randrange(4)] ^= 1 << draw.randrange(8)
        self._put(copy / WEIGHTS, bytes(content))
        with open_session(copy, RuntimeConfig(scratch=self.folder)) as session:
            streamed = session.stream(session.checkpoint)
            for index in range(streamed.layer_count):
                with streamed.layer(index) as layer:
                    if not all(bool(torch.isfinite(each).all()) for each in layer.parameters()):
                        return WRONG, f"layer {index} has a number that is not finite"
        return FINE, ""

    def configuration(self, number: int) -> None:
        draw, _name, copy = self._copy(f"configuration {number}")
        content = (copy / "config.json").read_bytes()
        self._put(copy / "config.json", json.dumps(mutated_value(json.loads(content), draw)).encode("utf-8", "replace"))
        self._seen(copy)

    def other_json(self, number: int) -> None:
        """The tokenizer's files, generation_config.json, and the bytes of config.json."""
        draw, _name, copy = self._copy(f"json {number}")
        file = draw.choice(sorted(copy.glob("*.json")))
        content = file.read_bytes()
        self._put(file, mutated_bytes(content, draw) if file.name == "config.json" else mutated_json(content, draw))
        self._seen(copy)

    def _copy(self, seed: str) -> tuple[random.Random, str, Path]:
        draw = random.Random(seed)
        name = draw.choice(sorted(self.whole))
        copy = self.folder / f"copy-{os.getpid()}"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in self.whole[name].iterdir():
            if file.is_file():
                os.link(file, copy / file.name)
        return draw, name, copy

    def _opened(self, copy: Path, name: str, file: Path, content: bytes) -> Outcome | None:
        self._put(file, content)
        seen = self._seen(copy)
        return None if seen == self.known[name] else (WRONG, f"{file.name} was damaged and is read as something else")

    def _put(self, file: Path, content: bytes) -> None:
        file.unlink()  # it is a link to the whole one
        file.write_bytes(content)

    def _seen(self, directory: Path) -> tuple[str, tuple[int, ...]]:
        """Return what a run sees of a checkpoint: the hash of its tensors and what its tokenizer makes of a text."""
        with open_session(directory, RuntimeConfig(scratch=self.folder)) as session:
            session.stream(session.checkpoint)
            ids = session.need_tokenizer()("the quick brown fox")["input_ids"]
            return session.checkpoint.sha256(), tuple(ids)


def main() -> None:
    given = options(__doc__, 2000).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        damage = Damage(Path(name))
        try_all("damaged checkpoints", damage.kinds(), given)


if __name__ == "__main__":
    main()
