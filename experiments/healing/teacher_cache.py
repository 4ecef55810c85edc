"""How near are the records of a cached teacher, and in how many bytes? Against DistillKit's recommended record.

    python experiments/healing/teacher_cache.py [MODEL]

Writes after every teacher, and a stopped run goes on where it was: delete the report to begin anew.

Three teachers: MODEL (default: the demo's checkpoint) on the bundled text, its student the same model without one
layer; and synthetic ones with a vocabulary of 128,256, whose probabilities fall as a power of the rank within each
token, ids drawn with (`zipf`) or without (`exchangeable`) a common frequency, the student's logits with noise. Records
go through the cache on disk: one shard to fit the codebook, then 2,048 tokens or more that are measured.

For each record: bytes a token; the error of KL(teacher || student) of a token, |difference| and mean; the error of its
gradient with respect to the student's logits, of a token and of the mean over all tokens (both in L1, over that of
the exact gradient). A sample's KL has an arbitrary constant, so only its gradient is compared. DistillKit's record
(328 bytes: 128 ids of 17 bits, 16 log-probabilities in bfloat16, a polynomial with a root term through the other 112)
is made here from its documentation; its own loss leaves the rest out ("zero"), and with our tail bucket it is better.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import CalibrationConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.losses import TeacherLogits, TokenLogits
from layer_surgery.healing.losses.divergences import forward_kl
from layer_surgery.healing.teacher import cache
from layer_surgery.healing.teacher.cache import TeacherCache, TeacherIdentity
from layer_surgery.healing.teacher.form import RecordForm
from layer_surgery.healing.teacher.records import TeacherRecords
from layer_surgery.runs.session import open_session

#: Tokens of a sequence of the synthetic teachers, sequences that the codebook is fitted to, and that are measured.
LENGTH, FITTED, MEASURED = 256, 16, 8
VOCABULARY = 128_256
#: Exponents of the power law of a token: their mean, deviation and least; entropies of 1 to 5 nats, as of a real model.
EXPONENTS = (1.6, 0.5, 1.05)
PEER_BYTES, PEER_K, PEER_EXACT = 328, 128, 16


@dataclass
class Teacher:
    """Logits of teacher and student, sequence by sequence; both [n, V] float32."""

    name: str
    sequences: list[Callable[[], tuple[Tensor, Tensor]]]
    fitted: int  #: How many of them the codebook is fitted to.
    data: dict[str, Any]

    def logits(self) -> Iterator[Tensor]:
        for sequence in self.sequences:
            yield sequence()[0]

    def measured(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for index in range(self.fitted, len(self.sequences)):
            yield index, *self.sequences[index]()


def real(model: str, removed: int) -> Teacher:
    """Return a checkpoint on the bundled text, and the same without one layer as its student."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval() for _ in range(2))
    layers = student.model.layers
    del layers[removed]
    student.config.num_hidden_layers = len(layers)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    with open_session(model, RuntimeConfig(dtype="float32")) as session:
        fitted = session.calibration_tokens(CalibrationConfig(samples=FITTED * 2, sequence_length=LENGTH))
        [measured] = session.evaluation_tokens(EvaluationConfig(eval_data="bundled", eval_windows=MEASURED))

    def at(tokens: PackedTokens, row: int) -> Callable[[], tuple[Tensor, Tensor]]:
        @torch.inference_mode()
        def logits() -> tuple[Tensor, Tensor]:
            ids, mask = tokens.token_ids[row : row + 1], tokens.loss_mask[row, 1:]
            one, other = (each(ids, use_cache=False).logits[0, :-1][mask].float() for each in (teacher, student))
            return one.clone(), other.clone()

        return logits

    sequences = [at(tokens, row) for tokens in (fitted, measured) for row in range(tokens.sequences)]
    data = {"fitted_sha256": fitted.sha256, "measured_sha256": measured.sha256, "student_without_layer": removed}
    return Teacher(Path(model).name, sequences, fitted.sequences, data)


def synthetic(name: str, common: float, scratch: Path) -> Teacher:
    """Return a teacher with power laws; `common` is the exponent of the ids' own frequencies. Kept in files."""
    files = [np.lib.format.open_memmap(scratch / f"{name}-{index}.npy", "w+", np.float32, (2, LENGTH, VOCABULARY))
             for index in range(FITTED + MEASURED)]  # fmt: skip
    mean, deviation, least = EXPONENTS
    for seed, file in enumerate(files):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(LENGTH, VOCABULARY, generator=generator).clamp(1e-12, 1 - 1e-7)
        keys = -common * torch.arange(1, VOCABULARY + 1).log() - (-uniform.log()).log()
        ranks = torch.empty_like(keys)
        ranks.scatter_(1, keys.argsort(dim=1, descending=True), torch.arange(1, VOCABULARY + 1.0).expand_as(keys))
        exponents = (mean + deviation * torch.randn(LENGTH, 1, generator=generator)).clamp_min(least)
        logits = -exponents * ranks.log() + 0.3 * torch.randn(keys.shape, generator=generator)
        file[0], file[1] = logits, logits + 0.4 * torch.randn(keys.shape, generator=generator)

    def at(file: np.ndarray) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (torch.from_numpy(file[0].copy()), torch.from_numpy(file[1].copy()))

    data = {"exponents": EXPONENTS, "common_exponent": common, "student_noise": 0.4}
    return Teacher(name, [at(file) for file in files], FITTED, data)


@torch.no_grad()
def peer(teacher: Tensor) -> TeacherLogits:
    """Return DistillKit's record of logits, with the mass of the rest as the tail."""
    log_probs, ids = teacher.log_softmax(dim=1).topk(PEER_K, dim=1)
    t = torch.arange(PEER_K - PEER_EXACT, dtype=torch.float64)
    terms = torch.stack([t**power for power in (0, 1, 2, 3, 4, 0.5)], dim=1)
    terms = terms / terms.amax(dim=0)
    curve = log_probs[:, PEER_EXACT:].double()
    coefficients = torch.linalg.lstsq(terms, curve.T).solution.float().double()
    values = torch.cat([log_probs[:, :PEER_EXACT].bfloat16().double(), (terms @ coefficients).T], dim=1)
    inside = values.exp().sum(dim=1)
    values = values - inside.clamp_min(1).log()[:, None]  # rounding may have made it more than one
    return TeacherLogits(values.float(), ids, (1 - values.exp().sum(dim=1)).clamp_min(0).log().float())


class Errors:
    """Sums over tokens of what a record does to KL and its gradient."""

    def __init__(self) -> None:
        self.tokens, self.absolute, self.signed, self.gradient = 0, 0.0, 0.0, 0.0
        self.mean_gradient: Tensor | float = 0.0

    def add(self, divergence: Tensor, gradient: Tensor) -> None:
        """Add the differences of KL [n] and of gradients [n, V] from the exact ones."""
        self.tokens += len(divergence)
        self.absolute += float(divergence.abs().sum())
        self.signed += float(divergence.sum())
        self.gradient += float(gradient.abs().sum())
        self.mean_gradient = self.mean_gradient + gradient.sum(dim=0)

    def summary(self, exact: Errors, *, sampled: bool = False) -> dict[str, float]:
        assert isinstance(self.mean_gradient, Tensor) and isinstance(exact.mean_gradient, Tensor)
        kl = {"kl_error": self.absolute / self.tokens, "kl_bias": self.signed / self.tokens}
        return ({} if sampled else kl) | {
            "gradient_error": self.gradient / exact.gradient,
            "mean_gradient_error": float(self.mean_gradient.abs().sum() / exact.mean_gradient.abs().sum()),
        }


def divergence(student: Tensor, teacher: TeacherLogits) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) [n] and its gradient [n, V]."""
    free = student.clone().requires_grad_()
    values = forward_kl(TokenLogits(free, teacher, torch.zeros(len(free), dtype=torch.int64)))
    values.sum().backward()
    assert free.grad is not None
    return values.detach(), free.grad


def captured(teacher: Teacher, form: RecordForm, scratch: Path) -> tuple[TeacherRecords, dict[str, Any]]:
    """Capture a teacher into a cache; return its records, and bytes and speed."""
    sizes = [len(logits) for logits in teacher.logits()]
    cache.SHARD_TOKENS = sum(sizes[: teacher.fitted])  # what the codebook is fitted to is the first shard
    identity = TeacherIdentity(teacher_sha256=teacher.name, tokenizer_sha256="", data_sha256="")
    directory = scratch / f"{teacher.name}-{form.form}-{form.bytes_per_token}-{form.samples}"
    vocabulary = next(teacher.logits()).shape[1]
    opened = TeacherCache.open(directory, identity, tokens=sizes, vocabulary=vocabulary, form=form)
    opened.capture(teacher.logits())
    records = opened.records()
    batch = list(range(len(sizes)))
    records.read(batch)
    start = time.process_time()  # of the processor: other work on the machine does not count
    records.read(batch)
    seconds = time.process_time() - start
    shards = sorted(directory.glob("shard-*"))[1:]
    return records, {
        "bytes_per_token": sum(path.stat().st_size for path in shards) / sum(sizes[teacher.fitted :]),
        "codebook_bytes": (directory / cache.CODEBOOK_FILE).stat().st_size,
        "decoded_tokens_per_second": round(sum(sizes) / seconds),
        "entries_per_token": float(np.mean([(records.read([i]).ids >= 0).sum(dim=1).float().mean() for i in batch])),  # type: ignore[operator]
    }


def measure(teacher: Teacher, scratch: Path) -> dict[str, Any]:
    """Return the errors of every record of a teacher."""
    forms = {f"top_k at {size}": RecordForm(bytes_per_token=size) for size in (64, 96)}
    forms |= {f"sampled {draws}": RecordForm(form="sampled", samples=draws) for draws in (50,)}
    caches = {name: captured(teacher, form, scratch) for name, form in forms.items()}
    errors = {name: Errors() for name in ("exact", "distillkit, tail", "distillkit, zero", *caches)}
    entropy = coverage = 0.0
    for index, logits, student in teacher.measured():
        log_probs = logits.log_softmax(dim=1)
        entropy += float(-(log_probs.exp() * log_probs).sum())
        coverage += float(log_probs.topk(PEER_K, dim=1).values.exp().sum())
        exact = divergence(student, TeacherLogits(log_probs))
        errors["exact"].add(*exact)
        with_tail = peer(logits)
        found = {
            "distillkit, tail": with_tail,
            "distillkit, zero": TeacherLogits(with_tail.log_probs, with_tail.ids),
            **{name: records.read([index]) for name, (records, _) in caches.items()},
        }
        for name, record in found.items():
            values, gradient = divergence(student, record)
            errors[name].add(values - exact[0], gradient - exact[1])
    tokens = errors["exact"].tokens
    records: dict[str, Any] = {
        name: {"bytes_per_token": PEER_BYTES} | errors[name].summary(errors["exact"])
        for name in ("distillkit, tail", "distillkit, zero")
    }
    for name, (_, facts) in caches.items():
        records[name] = facts | errors[name].summary(errors["exact"], sampled=forms[name].form == "sampled")
    print(teacher.name, records, flush=True)
    return {
        "data": teacher.data,
        "tokens": tokens,
        "entropy": entropy / tokens,
        f"mass_of_top_{PEER_K}": coverage / tokens,
        "kl": errors["exact"].signed / tokens,
        "records": records,
    }


def main() -> None:
    """Measure the records of three teachers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--without-layer", type=int, default=7, help="the layer that the real student lacks")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "healing" / "teacher_cache.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real_name = Path(arguments.model).name
    makers: dict[str, Callable[[Path], Teacher]] = {
        real_name: lambda _: real(arguments.model, arguments.without_layer),
        "zipf": lambda scratch: synthetic("zipf", 1.0, scratch),
        "exchangeable": lambda scratch: synthetic("exchangeable", 0.0, scratch),
    }
    results: dict[str, Any] = json.loads(arguments.report.read_text())["teachers"] if arguments.report.exists() else {}
    for name, make in makers.items():
        if name not in results:
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = measure(make(Path(scratch)), Path(scratch))
            write_report(arguments.report, {"teachers": results})


if __name__ == "__main__":
    main()
