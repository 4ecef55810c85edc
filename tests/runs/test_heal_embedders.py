"""Healing of embedding models from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, assert_refused, listing, tensors_of
from tiny_embedders import dense, saved_embedder, text_tokens
from tiny_encoders import VOCABULARY_ROWS, encoder_tokenizer, saved_encoder, tiny_encoder
from tiny_models import settings, streamed
from torch import Tensor

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.records.reading import read_report
from layer_surgery.walk.embedding import embedding_losses

WORDS = ("fox", "dog", "lazy", "quick", "brown", "one", "two", "three", "answer", "jumps")
QUICK: dict[str, Any] = {"continuations": 0, "sequence_length": 32}
HEAL: dict[str, Any] = QUICK | {"learning_rate": 1e-3, "tokens": 2000, "general": 0.0}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two hundred short texts of which no two are alike, one a row."""
    return written(tmp_path / "texts.jsonl")


def written(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows()), encoding="utf-8")
    return path


def rows() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(10, (3 + number % 7,), generator=generator).tolist() for number in range(300))
    return list(dict.fromkeys(" ".join(WORDS[word] for word in words) for words in drawn))[:200]


def cut(model: Path, output: Path, texts: Path, **more: Any) -> Path:
    chosen: dict[str, Any] = {"layers": [1, 2, 3], "keep": 0.15, "method": "svd", "samples": 60}
    layer_surgery.compress(model, output, calibration=str(texts), eval_data=None, **QUICK, **{**chosen, **more})
    return output


def behind(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of the modules behind the transformer, as a model opened anew has them."""
    embedder = open_checkpoint(directory).embedder
    assert embedder is not None
    return embedder.tensors


def vectors(directory: Path, folder: Path) -> Tensor:
    return text_vectors(
        streamed(directory), text_tokens(open_checkpoint(directory).objective, rows()), settings(folder)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what surgery made of it, and what healing made of that, in `model`, `smaller` and `healed`."""
    folder = tmp_path_factory.mktemp("healing")
    texts = written(folder / "texts.jsonl")
    model = saved_embedder(folder / "model", others=(dense(32, 16), {"kind": "Normalize"}))
    cut(model, folder / "smaller", texts)
    given = HEAL | {"data": str(texts), "teacher_cache": folder / "cache"}
    layer_surgery.heal(folder / "smaller", folder / "healed", eval_data=str(texts), **given)
    return folder


def test_a_healed_embedding_model_is_nearer_to_the_original_and_a_result_like_any_other(
    folder: Path, tmp_path: Path
) -> None:
    model, smaller, healed, texts = (folder / name for name in ("model", "smaller", "healed", "texts.jsonl"))
    report = read_report(healed / "surgery.json")
    healing, unhealed = report.healing, report.unhealed
    assert healing is not None and healing.helped and unhealed is not None
    assert [(loss.name, loss.weight) for loss in healing.losses] == [
        *(("embedding_cosine", 10), ("embedding_similarity", 200), ("embedding_relative", 20))
    ]
    first, last = healing.curve[1].losses, healing.curve[-1].losses
    assert first.keys() == {loss.name for loss in healing.losses}
    assert sum(loss.weight * last[loss.name] for loss in healing.losses) < (
        0.9 * sum(loss.weight * first[loss.name] for loss in healing.losses)
    )
    assert healing.tokens == 16 * healing.steps and healing.held_out_windows == 200 // 8
    assert healing.teacher_bytes_per_token == 16 * 4
    # What is reported is what the saved models give.
    teacher, before, after = (vectors(each, tmp_path) for each in (model, smaller, healed))
    for found, result in ((before, unhealed.result), (after, report.after)):
        expected = float(embedding_losses(found, teacher).mean())
        assert result.tasks[str(texts)].metrics["loss"].value == pytest.approx(expected, rel=1e-3)
    assert embedding_losses(after, teacher).mean() < 0.8 * embedding_losses(before, teacher).mean()
    cosines = [result.tasks[str(texts)].metrics["cosine"].value for result in (unhealed.result, report.after)]
    assert cosines[1] > cosines[0] + 0.02
    assert report.after.embedding[str(texts)].texts == 200
    # What is behind the transformer is trained too.
    assert behind(smaller).keys() == behind(healed).keys() == {"2_Dense/linear.weight", "2_Dense/linear.bias"}
    assert not any(torch.equal(tensor, behind(smaller)[name]) for name, tensor in behind(healed).items())
    page = (healed / "report.html").read_text(encoding="utf-8")
    assert f"rained it on {healing.tokens} texts to follow the original" in page and "nats per" not in page
    assert layer_surgery.verify(healed).problems == []


def test_the_vectors_of_the_original_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "layer_surgery.runs.healing.asking.asked", lambda *_: pytest.fail("the original was asked again")
    )
    given = HEAL | {"data": str(folder / "texts.jsonl"), "teacher_cache": folder / "cache"}
    layer_surgery.heal(folder / "smaller", tmp_path / "again", eval_data=None, **given)
    one, other = tensors_of(folder / "healed"), tensors_of(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_is_trained_first_and_more_of_the_model_after_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages of Jasper and Stella; the original is asked for its vectors once."""
    monkeypatch.setattr(
        "layer_surgery.runs.healing.asking.asked", lambda *_: pytest.fail("the original was asked again")
    )
    given = HEAL | {"data": str(folder / "texts.jsonl"), "teacher_cache": folder / "cache", "eval_data": None}
    report = layer_surgery.heal(folder / "smaller", tmp_path / "first", train="head", **given)
    assert report.healing is not None and report.healing.helped and report.healing.trained_parameters == 16 * 32 + 16
    before, after = tensors_of(folder / "smaller"), tensors_of(tmp_path / "first")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(
        torch.equal(each, behind(tmp_path / "first")[name]) for name, each in behind(folder / "smaller").items()
    )
    report = layer_surgery.heal(tmp_path / "first", tmp_path / "second", train="last", **given)
    assert report.healing is not None and report.healing.helped
    changed = {name for name, each in tensors_of(tmp_path / "second").items() if not torch.equal(each, after[name])}
    assert {name.split(".")[2] for name in changed if after[name].dim() > 1} == {"4"}  # the last
    assert not any(
        torch.equal(each, behind(tmp_path / "second")[name]) for name, each in behind(tmp_path / "first").items()
    )
    teacher, *others = (
        vectors(each, tmp_path)
        for each in (folder / "model", folder / "smaller", tmp_path / "first", tmp_path / "second")
    )
    losses = [float(embedding_losses(each, teacher).mean()) for each in others]
    assert losses[0] > losses[1] > losses[2]


def test_with_fewer_dimensions_similarities_alone_are_followed(tmp_path: Path, texts: Path) -> None:
    model = saved_embedder(tmp_path / "model")
    report = layer_surgery.compress(
        model,
        tmp_path / "output",
        layers=[1, 2],
        keep=0,
        method="remove",
        dimensions=8,
        calibration=str(texts),
        eval_data=None,
        samples=60,
        heal={key: value for key, value in HEAL.items() if key not in QUICK} | {"train": "last"},
        **QUICK,
    )
    assert report.healing is not None and report.healing.helped
    assert [loss.name for loss in report.healing.losses] == ["embedding_similarity", "embedding_relative"]
    assert vectors(tmp_path / "output", tmp_path).shape == (200, 8)
    smaller = cut(model, tmp_path / "smaller", texts, dimensions=8)
    again = layer_surgery.heal(smaller, tmp_path / "healed", data=str(texts), eval_data=None, **HEAL)
    assert again.healing is not None and again.healing.helped and len(again.healing.losses) == 2


def test_a_healing_that_gains_nothing_leaves_the_result_as_it_was(tmp_path: Path, texts: Path) -> None:
    whole: dict[str, Any] = {"layers": None, "keep": None, "method": None, "target_parameters": 1.0, "dimensions": 28}
    smaller = cut(saved_embedder(tmp_path / "model"), tmp_path / "smaller", texts, **whole)
    given = HEAL | {"learning_rate": 1.0, "tokens": 400}
    report = layer_surgery.heal(smaller, tmp_path / "healed", data=str(texts), eval_data=None, **given)
    assert report.healing is not None and not report.healing.helped
    one, other = tensors_of(smaller), tensors_of(tmp_path / "healed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_layers_by_themselves_general_text_and_an_original_that_does_not_say_what_it_is(
    tmp_path: Path, texts: Path
) -> None:
    model = tmp_path / "model"
    tiny_encoder("bert", "masked_token", vocab_size=VOCABULARY_ROWS).base_model.save_pretrained(model)
    encoder_tokenizer().save_pretrained(model)
    smaller = cut(model, tmp_path / "smaller", texts, layers=[2], head="embedding", pooling="mean")
    given = HEAL | {
        "general": 0.25,
        "tokens": 1000,
        "stages": ["local", "global"],
        "loss": ["embedding_cosine", "hidden:0.1"],
    }
    report = layer_surgery.heal(smaller, tmp_path / "healed", data=str(texts), eval_data=None, **given)
    assert report.healing is not None and report.healing.helped and report.healing.general_windows > 0
    assert [record.layer for record in report.healing.local] == [2]
    assert all(record.kept and record.after < record.before for record in report.healing.local)
    assert set(report.healing.curve[0].validation) == {"validation", "general"}
    assert set(report.healing.curve[-1].losses) == {"embedding_cosine", "hidden"}


@pytest.mark.slow
def test_sentence_transformers_gives_the_vectors_of_a_healed_model(folder: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    loaded = sentence_transformers.SentenceTransformer(
        str(folder / "healed"), device="cpu", trust_remote_code=True, local_files_only=True
    )
    found = loaded.encode(rows(), convert_to_tensor=True).double()
    assert torch.allclose(found, vectors(folder / "healed", tmp_path), atol=1e-5)


def test_what_an_embedding_model_cannot_be_healed_by_is_refused(run: CommandLine, tmp_path: Path, texts: Path) -> None:
    model = saved_embedder(tmp_path / "model")
    saved_encoder(tmp_path / "masked", "masked_token")
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(texts.read_text(encoding="utf-8").splitlines()[:9]), encoding="utf-8")
    before = listing(tmp_path)
    given = ("--calibration", texts, "--layers", "2", "--method", "remove", "--no-eval", "--sequence-length", 32)
    given = (*given, "--output", tmp_path / "output", "--heal")
    for options, said in (
        (("--heal-loss", "kl"), "--heal-loss kl is for models with a head, but this one gives embeddings; allowed"),
        (("--dimensions", 8, "--heal-loss", "embedding_cosine"), "with the original's, which has more numbers"),
        (("--heal-step-sequences", 2), "compares the texts of a step with each other; allowed: 3 or more."),
        (("--heal-train", "head"), "--heal-train head finds nothing to train: no module behind the transformer of"),
        (("--heal-teacher-rewrite",), "--heal-teacher-rewrite has a causal language model write answers"),
        (("--heal-data", few), "has 9 texts, too few to hold some out and train on the rest, which takes 16"),
    ):
        assert_refused(run("compress", model, *given, *options), said)
    assert_refused(
        run("compress", tmp_path / "masked", *given, "--heal-loss", "embedding_similarity"),
        "--heal-loss embedding_similarity compares embeddings, but the model gives none; take another loss.",
    )
    assert listing(tmp_path) == before
