"""What heal keeps, directories of embedding models and labelled data, changed at random and read by what reads them.

    python experiments/faults/fuzzed_healing.py [--count 1000] [--output reports/faults/fuzzed_healing.json]

Each is read, or refused with a sentence. What heal has kept of an original (its outputs, its answers) is never used
after it was changed: that would be silently wrong. `fuzzed_files.py` does the same with all other files.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import place_for_faults
from mutations import mutated_bytes, mutated_json, mutated_lines
from outcomes import FINE, REFUSED, WRONG, Outcome, options, try_all
from tiny_embedders import dense, saved_embedder
from tiny_encoders import labelled_file, saved_encoder
from torch import Tensor

from layer_surgery.config import CalibrationConfig, RuntimeConfig
from layer_surgery.data.packing import packed_tokens
from layer_surgery.healing.losses import TeacherLogits
from layer_surgery.healing.rewrite import load_rewritten, save_rewritten
from layer_surgery.healing.teacher import cache as teacher
from layer_surgery.healing.teacher.rows import captured_rows, stored_rows
from layer_surgery.runs.session import open_session

#: Tokens with loss in each sequence, and the size of the vocabulary.
TOKENS, V = [30, 41, 0, 25, 60], 50
IDENTITY = teacher.TeacherIdentity(teacher_sha256="a" * 64, tokenizer_sha256="b" * 64, data_sha256="c" * 64)


class Kept:
    """Files that are changed, made once, and how each kind is read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        teacher.SHARD_TOKENS = 60
        cache = teacher.TeacherCache.open(folder / "logits", IDENTITY, tokens=TOKENS, vocabulary=V)
        cache.capture([2 * torch.randn(sum(TOKENS), V, generator=torch.Generator().manual_seed(0))])
        self.logits = _plain(cache.records().read(range(len(TOKENS))))
        self.rows = captured_rows([torch.randn(7, 3)], folder / "rows.safetensors", IDENTITY)
        ids = torch.arange(40).view(5, 8)
        self.tokens = packed_tokens("task", ids, ids > 2, ids >= 0, 40)
        save_rewritten(self.tokens, 3, folder / "answers.safetensors")
        self.embedder = saved_embedder(folder / "embedder", others=(dense(32, 16), {"kind": "Normalize"}))
        self.labelled = {
            problem: (
                stack.enter_context(open_session(saved_encoder(folder / problem, problem), RuntimeConfig())),  # type: ignore[arg-type]
                labelled_file(folder / f"{problem}.jsonl", problem).read_bytes(),  # type: ignore[arg-type]
            )
            for problem in ("single_label", "multi_label", "tags", "regression")
        }

    def kinds(self) -> dict[str, Callable[[int], Outcome | None]]:
        labelled = {f"labelled: {problem}": self._labelling(problem) for problem in self.labelled}
        return {
            "original's logits": self.kept_logits,
            "original's outputs": self.kept_rows,
            "original's answers": self.kept_answers,
            "embedding model": self.embedding,
            **labelled,
        }

    def kept_logits(self, number: int) -> Outcome:
        draw, copy = random.Random(f"logits {number}"), self.folder / f"logits-{os.getpid()}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "logits", copy)
        file = draw.choice(sorted(copy.iterdir()))
        self._change(file, file, draw)
        cache = teacher.TeacherCache.open(copy, IDENTITY, tokens=TOKENS, vocabulary=V)
        if not cache.complete:
            return REFUSED, "captured again"
        found = _plain(cache.records().read(range(len(TOKENS))))
        return (FINE, "") if found == self.logits else (WRONG, f"{file.name} was changed, and is used")

    def kept_rows(self, number: int) -> Outcome:
        file = self._changed("rows.safetensors", random.Random(f"rows {number}"))
        return self._judged(stored_rows(file, IDENTITY, [7], lambda _note: None), self.rows)

    def kept_answers(self, number: int) -> Outcome:
        found = load_rewritten(self.tokens, self._changed("answers.safetensors", random.Random(f"answers {number}")))
        if found is not None and found[1] != 3:
            return WRONG, "another number of answers"
        return self._judged(None if found is None else found[0].token_ids, self.tokens.token_ids)

    def embedding(self, number: int) -> None:
        draw, copy = random.Random(f"embedding {number}"), self.folder / f"embedder-{os.getpid()}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.embedder, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "tokenizer.json")
        file = draw.choice(files)
        self._change(file, file, draw)
        with open_session(copy, RuntimeConfig(scratch=self.folder)) as session:
            session.stream(session.checkpoint)

    def _labelling(self, problem: str) -> Callable[[int], None]:
        session, content = self.labelled[problem]

        def read(number: int) -> None:
            file = self.folder / f"labelled-{os.getpid()}.jsonl"
            file.write_bytes(mutated_lines(content, random.Random(f"{problem} {number}")))
            config = CalibrationConfig(samples=8, sequence_length=40, calibration=[str(file)])
            session.calibration_tokens(config)

        return read

    def _changed(self, name: str, draw: random.Random) -> Path:
        file = self.folder / f"{os.getpid()}-{name}"
        self._change(self.folder / name, file, draw)
        return file

    def _change(self, file: Path, to: Path, draw: random.Random) -> None:
        content = file.read_bytes()
        change = mutated_json if file.suffix == ".json" and draw.random() < 0.8 else mutated_bytes
        to.write_bytes(change(content, draw))

    def _judged(self, found: Tensor | None, known: Tensor) -> Outcome:
        if found is None:
            return REFUSED, "not used"
        return (FINE, "") if torch.equal(found, known) else (WRONG, "it was changed, and is used")


def _plain(logits: TeacherLogits) -> list[object]:
    return [None if each is None else each.tolist() for each in (logits.ids, logits.log_probs, logits.tail)]


def main() -> None:
    given = options(__doc__, 1000).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name, ExitStack() as stack:
        try_all("what heal keeps, embedding models, labelled data", Kept(Path(name), stack).kinds(), given)


if __name__ == "__main__":
    main()
