"""Embedding models that follow several teachers, of which some have other tokenizers and other sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import CommandLine, assert_refused, saved_model, tensors_of
from tiny_embedders import dense, saved_embedder
from tiny_encoders import encoder_tokenizer
from tiny_models import settings, streamed
from torch import Tensor

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.documents import LoadedData, Text
from layer_surgery.data.objective import Objective
from layer_surgery.data.packing import pack_evaluation
from layer_surgery.evaluation.text_encoder import TextEncoder
from layer_surgery.records.reading import read_report
from layer_surgery.runs.healing.teachers import side_by_side
from layer_surgery.walk.embedding import embedding_losses

WORDS = ("fox", "dog", "lazy", "quick", "brown", "one", "two", "three", "answer", "jumps")
SIMILARITIES = ("embedding_similarity:200", "embedding_relative:20")
HEAL: dict[str, Any] = {
    "continuations": 0, "sequence_length": 32, "learning_rate": 1e-3, "tokens": 1200, "general": 0.0, "eval_data": None,
}  # fmt: skip


def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(10, (3 + number % 7,), generator=generator).tolist() for number in range(300))
    return list(dict.fromkeys(" ".join(WORDS[word] for word in words) for words in drawn))[:160]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and what surgery made of it, and a larger model with another tokenizer and with a prompt."""
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()), encoding="utf-8")
    model = saved_embedder(folder / "model", others=(dense(32, 16), {"kind": "Normalize"}))
    given: dict[str, Any] = {"layers": [1, 2, 3], "keep": 0.15, "method": "svd", "samples": 60, "continuations": 0}
    data = {"calibration": str(folder / "texts.jsonl"), "eval_data": None, "sequence_length": 32}
    layer_surgery.compress(model, folder / "smaller", **given, **data)
    prompts = {"prompts": {"all": "answer the fox "}, "default_prompt_name": "all"}
    other = saved_embedder(folder / "other", "roberta", pooling="cls", settings=prompts, others=())
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = rotated(tokenizer["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def rotated(vocabulary: dict[str, int]) -> dict[str, int]:
    """Return the same words with other numbers, but for the first eleven, which are special tokens."""
    words = [word for word, number in vocabulary.items() if number > 10]
    numbers = [vocabulary[word] for word in words]
    return {**vocabulary, **dict(zip(words, numbers[7:] + numbers[:7], strict=True))}


def heal(folder: Path, output: Path, *teachers: Path, **more: Any) -> Any:
    given = HEAL | {"data": str(folder / "texts.jsonl")} | more
    return layer_surgery.heal(folder / "smaller", output, teacher=list(teachers) or None, **given).healing


def vectors(model: Path, scratch: Path) -> Tensor:
    from transformers import AutoTokenizer

    encoder = TextEncoder(streamed(model), AutoTokenizer.from_pretrained(model), settings(scratch))
    return encoder.encode(texts(), encoder.embedder.prompt)


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a page takes longer than such a healing."""
    monkeypatch.setattr("layer_surgery.reporting.page.report_page", lambda *_, **__: "<p>not drawn</p>")


@pytest.mark.usefixtures("_no_page")
def test_two_equal_teachers_are_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "twin")
    one = heal(folder, tmp_path / "one", loss=SIMILARITIES, tokens=600)
    two = heal(folder, tmp_path / "two", folder / "model", tmp_path / "twin", loss=SIMILARITIES, tokens=600)
    assert one.helped and two.helped and one.teachers == []
    assert [(each.original, each.dimensions) for each in two.teachers] == [(True, 16), (False, 16)]
    for mine, theirs in zip(one.curve, two.curve, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    first, second, before = (tensors_of(each) for each in (tmp_path / "one", tmp_path / "two", folder / "smaller"))
    for name, tensor in first.items():
        if "key.bias" in name:  # of which no output depends, so that its steps are of rounding alone
            continue
        moved = (tensor - before[name]).abs().max()
        assert (tensor - second[name]).abs().max() <= 0.02 * moved + 1e-7, name


def test_a_student_comes_nearer_to_both_teachers_together(folder: Path, tmp_path: Path) -> None:
    record = heal(folder, tmp_path / "healed", folder / "other", folder / "model", tokens=3000)
    assert record.helped and [loss.name for loss in record.losses] == ["embedding_similarity", "embedding_relative"]
    # The original comes first, whatever the order in which they are named.
    assert [(Path(each.name).name, each.dimensions) for each in record.teachers] == [("model", 16), ("other", 32)]
    assert record.teacher_bytes_per_token == 4 * (16 + 32)
    teachers = side_by_side([vectors(folder / name, tmp_path) for name in ("model", "other")], 16)
    losses = [
        float(embedding_losses(vectors(each, tmp_path).double(), teachers.double()).mean())
        for each in (folder / "smaller", tmp_path / "healed")
    ]
    assert losses[1] < 0.7 * losses[0]
    report = read_report(tmp_path / "healed" / "surgery.json")
    assert report.healing is not None and report.healing.teachers == record.teachers
    assert "to follow 2 teachers" in (tmp_path / "healed" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_no_page")
def test_vectors_are_kept_by_teacher_and_text_and_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, cache = (folder / "model", folder / "other"), tmp_path / "cache"
    given: dict[str, Any] = {"tokens": 300, "loss": ["embedding_cosine:10:projected=1", *SIMILARITIES]}
    record = heal(folder, tmp_path / "without", *pair, **given)
    # The map into the teachers' space begins where it is of use, and stays behind.
    first, last = record.curve[1].losses["embedding_cosine"], record.curve[-1].losses["embedding_cosine"]
    assert record.helped and max(first, last) < 0.2
    found = [open_checkpoint(each).embedder for each in (folder / "smaller", tmp_path / "without")]
    assert all(each is not None for each in found)
    assert {n: t.shape for n, t in found[0].tensors.items()} == {n: t.shape for n, t in found[1].tensors.items()}
    heal(folder, tmp_path / "first", *pair, teacher_cache=cache, **given)
    files = sorted(cache.glob("outputs-*.safetensors"))
    assert len(files) == 6  # of each: what is held out, what the map begins with and what is trained on
    kept = torch.cat([rows for file in files if (rows := load_file(file)["rows"]).shape[1] == 32])
    expected = vectors(folder / "other", tmp_path)  # by its own tokens, behind its own prompt
    nearest = torch.cdist(kept.double(), expected.double()).min(dim=1).values
    assert len(kept) > 40 and nearest.max() < 1e-4 * expected.norm(dim=1).mean()
    monkeypatch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("the other teacher was asked again"))
    monkeypatch.setattr("layer_surgery.runs.healing.asking.asked", lambda *_: pytest.fail("so was the original"))
    heal(folder, tmp_path / "second", *pair, teacher_cache=cache, **given)
    assert sorted(cache.glob("outputs-*.safetensors")) == files
    weights = [tensors_of(tmp_path / name) for name in ("without", "first", "second")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) and torch.equal(tensor, weights[2][name]), name


def test_side_by_side_cosines_are_means_and_spaces_stay_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(9, 5, generator=generator), 7 * torch.randn(9, 11, generator=generator)
    found = side_by_side([one, other], 40)
    normal = [torch.nn.functional.normalize(each, dim=1) for each in (one, other)]
    assert torch.allclose(found @ found.T, (normal[0] @ normal[0].T + normal[1] @ normal[1].T) / 2, atol=1e-6)
    apart = side_by_side([one, other], 16)
    assert apart.shape == (9, 17) and torch.equal(apart[:, :16], found) and not apart[:, 16].any()


def test_the_texts_of_sequences_are_those_that_were_given() -> None:
    """Whole, by paragraph, or in pieces that put together are the whole."""
    model = "the quick brown fox"
    long = "One two three. " * 20 + "Jumps over the lazy dog"
    data = LoadedData("data", [Text(model), Text(f"{model}\n\n{long}")], "text")
    tokenizer = encoder_tokenizer()
    objective = Objective(problem="embedding", prompt="the answer ", padding_id=0)
    tokens = pack_evaluation(data, tokenizer, sequence_length=24, objective=objective)
    assert tokens.texts is not None and len(tokens.texts) == tokens.sequences
    assert tokens.texts[:2] == (model, model)
    pieces = tokens.texts[2:]
    assert len(pieces) > 3 and "".join(pieces).replace(" ", "") == long.replace(" ", "")
    for row, text in zip(tokens.token_ids[tokens.valid.any(dim=1)], tokens.texts, strict=True):
        said = tokenizer.decode(row, skip_special_tokens=True).lower().replace(" ", "")
        assert text.lower().replace(" ", "") in said
    chosen = tokens.select(torch.tensor([3, 0]))
    assert chosen.texts == (tokens.texts[3], tokens.texts[0]) and chosen.first_tokens(8).texts == chosen.texts
    assert tokens.select(slice(1, 3)).texts == tokens.texts[1:3]


def test_teachers_that_cannot_be_are_refused(run: CommandLine, folder: Path, tmp_path: Path) -> None:
    given = ("--data", folder / "texts.jsonl", "--no-eval", "--sequence-length", 32, "--output", tmp_path / "out")
    pair = ("--teacher", folder / "model", "--teacher", folder / "other")

    def refused(*options: Any, said: str) -> None:
        assert_refused(run("heal", folder / "smaller", *given, *options), said)

    refused(
        *pair,
        "--loss",
        "embedding_cosine",
        said="those of several teachers side by side, which are in another space; leave",
    )
    refused(*pair, "--stages", "local", said="--stages local has layers follow the original's alone")
    plain = tmp_path / "plain"
    shutil.copytree(folder / "other", plain)
    (plain / "modules.json").unlink()
    refused("--teacher", folder / "model", "--teacher", plain, said="says nowhere how it makes a vector of a text")
    refused("--teacher", folder / "other", said="give the model that it was made of")
    assert not (tmp_path / "out").exists()


def test_a_causal_model_has_one_teacher(run: CommandLine, tmp_path: Path) -> None:
    model, text = saved_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    data = ("--sequence-length", 16, "--no-eval", "--continuations", 0)
    made = run(
        "compress", model, "--layers", 1, "--method", "remove", "--no-refit", *data, "--output", tmp_path / "small"
    )
    assert made.code == 0, made.err
    twice = ("--teacher", model, "--teacher", model, "--data", text, *data, "--output", tmp_path / "out")
    assert_refused(run("heal", tmp_path / "small", *twice), "--teacher is given 2 times", "give the original alone")
