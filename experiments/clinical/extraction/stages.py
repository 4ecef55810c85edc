"""The stages of the recipe. Each writes what it makes into the run's folder, and is not done again if that is there.

Notes of different uses come from different seeds, so no set shares a note with another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import layer_surgery
from extraction import json_labeller, tagger
from extraction.labellers import lexicon_labeller, rule_labeller
from extraction.notes import Note, Span, write_notes
from extraction.sizes import Size
from extraction.tags import check_classes, write_tagged
from extraction.terms import split_terms
from extraction.unions import best_unions, labelled_by
from layer_surgery.data import load_documents, pack_evaluation

LABELLERS = ("llm", "lexicon", "rules")
#: Whole layers that the compressed tagger keeps, of twelve; and of the causal LM, whose other layers keep a part.
TAGGER_LAYERS, LLM_LAYERS, LLM_KEEP = 6, 9, 0.2
#: Tokens of a sequence of prompts and answers that calibrates the causal LM.
LLM_LENGTH = 256


@dataclass(frozen=True)
class Recipe:
    """One run: its folder, size, seed and causal LM."""

    folder: Path
    size: Size
    seed: int
    llm: Path

    @cached_property
    def notes(self) -> dict[str, list[Note]]:
        """Return every set of synthetic notes by name."""
        size, lexicon = self.size, split_terms(self.seed)
        sets = {"train": size.train, "few": size.few, "choice": size.choice, "test": size.test}
        notes = {name: write_notes(count, lexicon, f"{name} {self.seed}") for name, count in sets.items()}
        notes["external"] = write_notes(size.test, lexicon, f"external {self.seed}", external=True)
        for name, those in notes.items():
            check_classes([note.spans for note in those], f"the notes '{name}'")
        return notes

    def texts(self, name: str) -> list[str]:
        return [note.text for note in self.notes[name]]

    def gold(self, name: str) -> list[list[Span]]:
        return [list(note.spans) for note in self.notes[name]]

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder / "encoder")

    # The teacher

    def fine_tuned(self) -> Path:
        """Fine-tune the causal LM on a few gold notes, with loss on the JSON only."""

        def make(directory: Path) -> Any:
            model = AutoModelForCausalLM.from_pretrained(self.llm, dtype=torch.float32)
            rows = json_labeller.rows_of(self.notes["few"])
            json_labeller.write_rows(self.folder / "few.jsonl", rows)
            tokenizer = AutoTokenizer.from_pretrained(self.llm)
            steps = self.size.llm_steps
            loss = json_labeller.fine_tune(model, tokenizer, rows, steps=steps, seed=self.seed)
            tagger.save(model, tokenizer, directory)
            return {"loss": loss, "rows": len(rows), "steps": steps}

        return self._checkpoint("llm", make)

    def written(self, model: Path, name: str, count: int | None = None, *, constrained: bool = True) -> dict[str, Any]:
        """Return what a causal LM writes for the notes of a set: spans, and what of its answers could not be used."""

        def make() -> dict[str, Any]:
            loaded = layer_surgery.load(model, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(self.llm)  # of a compressed one as well, which would ask
            texts = self.texts(name)[:count]
            return asdict(json_labeller.write_findings(loaded, tokenizer, texts, constrained=constrained))

        way = "" if constrained else "-free"
        found = self._once(f"written-{model.name}-{name}{'' if count is None else f'-{count}'}{way}", make)
        return found | {"spans": _spans(found["spans"])}

    def labels(self, name: str, labellers: Collection[str] = LABELLERS) -> dict[str, list[list[Span]]]:
        """Return what each of the labellers finds in the notes of a set."""
        texts = self.texts(name)
        ways: dict[str, Callable[[], list[list[Span]]]] = {
            "llm": lambda: self.written(self.fine_tuned(), name)["spans"],
            "lexicon": lambda: list(map(lexicon_labeller(self.seed), texts)),
            "rules": lambda: list(map(rule_labeller, texts)),
        }
        return {labeller: ways[labeller]() for labeller in LABELLERS if labeller in labellers}

    @cached_property
    def choice(self) -> tuple[dict[str, tuple[str, ...]], list[dict]]:
        """Return the best union of labellers for each kind, on the gold notes for that, and F1 of every union."""
        return best_unions(self.labels("choice"), self.notes["choice"])

    @property
    def asks_the_llm(self) -> bool:
        """Whether the causal LM is in a best union."""
        return any("llm" in union for union in self.choice[0].values())

    def teacher(self, name: str) -> list[list[Span]]:
        """Return the labels of the best unions; a labeller that is in none of them is not asked."""
        best = self.choice[0]
        return labelled_by(best, self.labels(name, {labeller for union in best.values() for labeller in union}))

    # The taggers

    def encoder(self) -> Path:
        """Train the encoder on the unlabelled notes."""

        def make(directory: Path) -> Any:
            steps = self.size.encoder_steps
            loss = tagger.train_encoder(self.texts("train"), directory, steps=steps, seed=self.seed)
            return {"loss": loss, "steps": steps}

        return self._checkpoint("encoder", make)

    def trained(self, name: str, labels: Callable[[], Sequence[Sequence[Span]]]) -> Path:
        """Train a tagger of this name on the notes for training, with the labels given; write them beside it."""
        encoder = self.encoder()

        def make(directory: Path) -> Any:
            texts, given, steps = self.texts("train"), labels(), self.size.tagger_steps
            write_tagged(self.folder / f"{name}.jsonl", texts, given)
            loss = tagger.train_tagger(encoder, texts, given, directory, self.tokenizer(), steps=steps, seed=self.seed)
            return {"loss": loss, "steps": steps}

        return self._checkpoint(name, make)

    def compressed(self, model: Path) -> Path:
        """Remove half of the tagger's layers; calibrated on the labels that it was trained on, not on gold.

        ModernBERT's first layer has no norm before its attention, so no other can take its place: it always stays.
        """
        looked_at: dict[str, Any] = {
            "calibration": str(self.folder / f"{model.name}.jsonl"),
            "samples": self.size.samples,
            "sequence_length": tagger.WINDOW,
            "window_overlap": tagger.OVERLAP,
            "cache": self.folder / "statistics",
            "seed": self.seed,
        }

        def make(output: Path) -> None:
            removed = tagger.SIZES["num_hidden_layers"] - TAGGER_LAYERS
            order = [layer for layer in layer_surgery.score(model, **looked_at).removal_order if layer != 0]
            layers, test = sorted(order[:removed]), str(self._test_file())
            layer_surgery.compress(model, output, layers=layers, keep=0, eval_data=test, **looked_at)

        return self._result("compressed", make)

    def healed(self, model: Path) -> Path:
        """Heal the compressed tagger on the outputs of the one that it was made of, on the notes for training."""
        return self._result(
            "healed",
            lambda output: layer_surgery.heal(
                model,
                output,
                data=str(self.folder / "distilled.jsonl"),
                loss=["kl"],
                tokens=self.size.heal_tokens,
                eval_data=str(self._test_file()),
                sequence_length=tagger.WINDOW,
                window_overlap=tagger.OVERLAP,
                seed=self.seed,
            ),
        )

    def compressed_llm(self, model: Path) -> Path:
        """Compress the causal LM with the loss of its answers."""
        calibration = str(self.folder / "few.jsonl")

        def make(output: Path) -> None:
            # How many sequences the rows fill depends a little on their order, which calibration shuffles.
            tokenizer = AutoTokenizer.from_pretrained(model)
            rows = load_documents(calibration, part="calibration")
            packed = pack_evaluation(rows, tokenizer, sequence_length=LLM_LENGTH)
            layer_surgery.compress(
                model,
                output,
                target_layers=LLM_LAYERS,
                keep=LLM_KEEP,
                calibration=calibration,
                eval_data=None,
                continuations=0,
                samples=min(self.size.samples, packed.sequences * 9 // 10),
                sequence_length=LLM_LENGTH,
                seed=self.seed,
            )

        return self._result("llm-compressed", make)

    def found(self, model: Path, name: str) -> list[list[Span]]:
        """Return what a tagger finds in the notes of a set."""

        def make() -> dict[str, Any]:
            spans = tagger.find(load_tagger(model), self.tokenizer(), self.texts(name))
            return {"spans": [[asdict(span) for span in each] for each in spans]}

        return _spans(self._once(f"found-{model.name}-{name}", make)["spans"])

    def _test_file(self) -> Path:
        path = self.folder / "test.jsonl"
        write_tagged(path, self.texts("test"), self.gold("test"))
        return path

    # What is there is not made again

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            beside = path.with_suffix(".partial")
            beside.write_text(json.dumps(make()), encoding="utf-8")
            beside.rename(path)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def _checkpoint(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Make a checkpoint in a folder of this name; its log is there when it is whole."""
        self._once(f"{name}-log", lambda: {"log": make(self.folder / name)})
        return self.folder / name

    def _result(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Make a result, which Layer Surgery renames into its place when it is whole."""
        path = self.folder / name
        if not path.exists():
            print(f"{name} ...", flush=True)
            make(path)
        return path


def load_tagger(model: Path) -> Any:
    """Load a tagger with stock transformers, as its users do."""
    return AutoModelForTokenClassification.from_pretrained(model, dtype=torch.float32).eval()


def _spans(written: Sequence[Sequence[dict[str, Any]]]) -> list[list[Span]]:
    return [[Span(**span) for span in each] for each in written]
