"""Embedding models through every command, and their results in sentence-transformers where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, assert_refused, listing
from tiny_embedders import TEXTS, dense, saved_embedder, text_tokens
from tiny_encoders import encoder_tokenizer, tiny_encoder
from tiny_models import settings, streamed

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.runs.dimensions import check_dimensions

#: More texts than one, in paragraphs, for a sequence is shorter than the whole.
WORDS = ("fox", "dog", "lazy", "quick", "brown", "one", "two", "three", "answer", "jumps")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty short texts of which no two are alike, one a row."""
    rows = [
        {"text": " ".join(WORDS[(first + 3 * step * (second + 1)) % 10] for step in range(3 + second))}
        for first in range(10)
        for second in range(6)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def given(texts: Path, *more: Any) -> tuple[Any, ...]:
    return ("--calibration", texts, "--eval-data", texts, "--sequence-length", 32, "--samples", 60, *more)


def compressed(run: CommandLine, model: Path, output: Path, *options: Any) -> dict[str, Any]:
    outcome = run("compress", model, *options, "--output", output)
    assert outcome.code == 0, outcome.err
    return json.loads((output / "surgery.json").read_text(encoding="utf-8"))


def test_what_is_measured_of_a_result_is_what_its_vectors_are(run: CommandLine, tmp_path: Path, texts: Path) -> None:
    model, output = saved_embedder(tmp_path / "model", others=(dense(32, 16), {"kind": "Normalize"})), tmp_path / "out"
    report = compressed(run, model, output, *given(texts, "--target-parameters", 0.8))
    assert open_checkpoint(output).low_rank or open_checkpoint(output).narrowed
    assert (
        report["base_model"]["head"] == "embedding" and report["base_model"]["loss_unit"] == "embedding loss per text"
    )
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    before, after = (
        text_vectors(streamed(path), text_tokens(open_checkpoint(path).objective, rows), settings(tmp_path))
        for path in (model, output)
    )
    cosines = torch.nn.functional.cosine_similarity(before, after)
    found = report["after"]["tasks"][str(texts)]
    assert found["items"] == 60 and found["metrics"]["cosine"]["value"] == pytest.approx(
        float(cosines.mean()), rel=1e-5
    )
    assert 0.3 < float(cosines.mean()) < 0.9999 and found["metrics"]["loss"]["value"] > 0
    quality = report["after"]["embedding"][str(texts)]
    pairs = torch.triu_indices(60, 60, offset=1)
    ranks = [(v @ v.T)[pairs[0], pairs[1]].argsort().argsort().double() for v in (before, after)]
    spearman = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    first = quality["points"][0]
    assert (first["dimensions"], first["storage"], first["bytes_per_vector"]) == (16, "float32", 64)
    assert first["similarity"]["value"] == pytest.approx(spearman, abs=0.01)
    assert {point["storage"] for point in quality["points"]} == {"float32", "int8", "binary"}
    assert quality["asymmetric"]["ndcg10"].keys() == quality["original_ndcg10"].keys() == {"passage", "text"}
    assert "general text" not in report["calibration"]
    for name in ("report.html", "README.md"):
        text = (output / name).read_text(encoding="utf-8")
        assert "SentenceTransformer(" in text and "perplexit" not in text.lower() and "causal" not in text.lower()
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: feature-extraction" in card and "sentence-transformers" in card
    measured = run("evaluate", output, "--baseline", model, "--eval-data", texts, "--sequence-length", 32, "--json")
    assert measured.code == 0, measured.err
    again = json.loads(measured.out)["model"]["embedding"][str(texts)]
    assert again["points"][0]["similarity"] == first["similarity"]
    verified = run("verify", output)
    assert verified.code == 0, verified.err


def test_a_plain_transformer_becomes_a_directory_of_sentence_transformers(
    run: CommandLine, tmp_path: Path, texts: Path
) -> None:
    model, output = tmp_path / "model", tmp_path / "output"
    tiny_encoder("mpnet", "masked_token", vocab_size=320, dtype=torch.float32).save_pretrained(model)
    encoder_tokenizer().save_pretrained(model)
    cut = ("--target-layers", 3, "--method", "remove", "--refit")
    report = compressed(run, model, output, *given(texts, *cut, "--head", "embedding", "--pooling", "mean"))
    listed = json.loads((output / "modules.json").read_text(encoding="utf-8"))
    assert [each["type"].rpartition(".")[2] for each in listed] == ["Transformer", "Pooling", "Normalize"]
    assert not (output / "modeling_layer_surgery.py").exists()
    assert report["provenance"]["config"]["pooling"] == "mean" and report["after"]["layers"] == 3
    assert report["expected"]["value"] > 0
    assert run("verify", output).code == 0  # it finds the original again, with its head


def test_score_sweep_and_evaluate_of_an_embedding_model(run: CommandLine, tmp_path: Path, texts: Path) -> None:
    model, directory = saved_embedder(tmp_path / "model"), tmp_path / "sweep"
    scores = run("score", model, "--calibration", texts, "--samples", 60, "--sequence-length", 32, "--json")
    assert scores.code == 0, scores.err
    assert "(embedding loss per text)" in json.loads(scores.out)["quantity"]
    swept = run("sweep", model, *given(texts, "--target-layers", "4,3", "--method", "remove", "--output", directory))
    assert swept.code == 0, swept.err
    assert "embedding loss" in swept.out and "similarity" in swept.out
    sweep = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
    assert len(sweep["points"]) == 2
    for point in sweep["points"]:
        assert point["embedding_loss"] == point["result"]["tasks"][str(texts)]["metrics"]["loss"]["value"] > 0
        assert point["loss_ratio"] is None and point["perplexity_ratio"] is None
    smallest = min(sweep["points"], key=lambda point: point["parameters"])
    assert "parameters" in smallest["fronts"]
    alone = run("evaluate", model, "--eval-data", texts, "--sequence-length", 32, "--json")
    assert alone.code == 0, alone.err
    point = json.loads(alone.out)["model"]["embedding"][str(texts)]["points"][0]
    assert point["similarity"]["value"] == pytest.approx(1.0)  # beside itself


def test_wrong_input_is_refused_before_anything_is_done(
    run: CommandLine, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = saved_embedder(tmp_path / "model"), tmp_path / "output"
    labelled = tmp_path / "chat.jsonl"
    labelled.write_text(json.dumps({"prompt": "a", "answer": "b"}), encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n".join([json.dumps({"text": "fox"}), json.dumps({"text": "  "})]), encoding="utf-8")
    before = listing(tmp_path)
    cut = ("--target-layers", 4, "--method", "remove", "--output", output, "--sequence-length", 32)
    long = ("--calibration", texts, "--eval-data", texts)
    assert_refused(
        run("compress", model, *long, *cut[:-1], 61), "--sequence-length is 61, but the model takes at most 60"
    )
    assert_refused(run("compress", model, "--calibration", labelled, *cut), "an embedding model is calibrated on texts")
    assert_refused(run("compress", model, "--calibration", empty, "--samples", 2, *cut), "text")
    assert_refused(run("compress", model, "--prompt", "a", *cut), "--prompt need a causal language model")
    monkeypatch.setattr("layer_surgery.runs.evaluator.mteb_is_here", lambda: False)
    assert_refused(run("compress", model, "--tasks", "bundled", *cut), "need mteb, which is not installed: pip install")
    assert_refused(run("compress", model, "--pooling", "median", *cut), "--pooling is 'median'; allowed: cls, max")
    assert_refused(run("compress", model, "--head", "classes", *cut), "--head is 'classes'; allowed: auto, embedding")
    assert_refused(run("compress", model, "--pooling", "cls", *cut), "says itself how it pools (mean)")
    assert_refused(run("compress", model, *long, "--samples", 61, *cut), "fewer than --samples 61")
    assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "qwen3"])
def test_sentence_transformers_gives_the_vectors_that_were_measured(
    run: CommandLine, tmp_path: Path, texts: Path, model_type: str
) -> None:
    """Of the original, of one with fewer layers (plain), and of a low-rank one (with the modelling file)."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = saved_embedder(
        tmp_path / "model",
        model_type,
        pooling="lasttoken" if model_type == "qwen3" else "mean",
        others=(dense(32, 16, activation="activation.Tanh"), {"kind": "Normalize"}),
        settings={"prompts": {"query": "the "}, "default_prompt_name": "query"},
    )
    plain, low_rank = tmp_path / "plain", tmp_path / "low_rank"
    quick = ("--calibration", texts, "--samples", 60, "--sequence-length", 32, "--no-eval")
    compressed(run, model, plain, *quick, "--layers", "1,3", "--method", "remove")
    compressed(run, model, low_rank, *quick, "--target-parameters", 0.8)
    for path in (model, plain, low_rank):
        loaded = sentence_transformers.SentenceTransformer(str(path), trust_remote_code=path == low_rank)
        theirs = torch.from_numpy(loaded.encode(list(TEXTS))).double()
        objective = open_checkpoint(path).objective
        ours = text_vectors(streamed(path, dtype=torch.float32), text_tokens(objective), settings(tmp_path))
        assert objective.prompt == "the " and theirs.shape == (len(TEXTS), 16)
        assert float((ours - theirs).abs().max()) < 1e-5, path.name


def test_fewer_dimensions_are_a_dense_module_that_keeps_similarities(
    run: CommandLine, tmp_path: Path, texts: Path
) -> None:
    """Nothing else is done to the model, so what changes is the map."""
    model, output = saved_embedder(tmp_path / "model", others=(dense(32, 24), {"kind": "Normalize"})), tmp_path / "out"
    report = compressed(run, model, output, *given(texts, "--target-parameters", 1, "--dimensions", 16))
    listed = json.loads((output / "modules.json").read_text(encoding="utf-8"))
    assert [each["path"] for each in listed] == [*("", "1_Pooling", "2_Dense", "3_Normalize", "4_Dense", "5_Normalize")]
    config = json.loads((output / "4_Dense" / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "torch.nn.modules.linear.Identity" and config["bias"] is True
    quality = report["after"]["embedding"][str(texts)]
    kept = {point["dimensions"]: point["similarity"]["value"] for point in quality["points"][:2]}
    assert kept.keys() == {16, 8} and quality["asymmetric"] is None
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    tokens = text_tokens(open_checkpoint(model).objective, rows)
    before, after = (text_vectors(streamed(path), tokens, settings(tmp_path)) for path in (model, output))
    assert after.shape == (60, 16)
    cut = torch.nn.functional.normalize(before[:, :16], dim=1)
    first, second = torch.triu_indices(60, 60, offset=1)
    pairs = torch.stack([(each @ each.T)[first, second] for each in (before, after, cut)])
    _, ours, theirs = torch.corrcoef(pairs)[0].tolist()
    assert 1 - ours < 0.3 * (1 - theirs)
    assert kept[16] > 0.95 and report["after"]["parameters"] == report["before"]["parameters"] + 16 * (24 + 1)
    assert "cosine" not in report["after"]["tasks"][str(texts)]["metrics"]
    again = run("compress", output, *given(texts, "--target-parameters", 1, "--dimensions", 16, "--dry-run"))
    assert_refused(again, "--dimensions is 16; allowed: 1 to 15 (the model's vectors have 16)")


def test_vectors_are_as_wide_as_hidden_states_and_not_as_embeddings_of_tokens(tmp_path: Path) -> None:
    electra = open_checkpoint(saved_embedder(tmp_path / "model", "electra"))
    assert electra.skeleton.get_input_embeddings().weight.shape[1] == 24
    check_dimensions(electra, 31)
    with pytest.raises(layer_surgery.UserError, match=r"allowed: 1 to 31 \(the model's vectors have 32\)"):
        check_dimensions(electra, 32)


def test_dimensions_are_for_embedding_models_and_need_texts(run: CommandLine, tmp_path: Path, texts: Path) -> None:
    model, output = saved_embedder(tmp_path / "model"), tmp_path / "output"
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(texts.read_text(encoding="utf-8").splitlines()[:5]), encoding="utf-8")
    quick = (
        "--no-eval",
        "--samples",
        5,
        "--sequence-length",
        32,
        "--layers",
        2,
        "--method",
        "remove",
        "--output",
        output,
    )
    outcome = run("compress", model, "--calibration", few, *quick, "--dimensions", 20)
    assert_refused(outcome, "--dimensions 20 cannot be made of 5 texts")
    (model / "modules.json").unlink()
    tiny_encoder("bert", "masked_token", vocab_size=320, dtype=torch.float32).save_pretrained(model)
    refused = run("compress", model, "--calibration", few, *quick, "--dimensions", 20)
    assert_refused(refused, "--dimensions 20 is for embedding models")
    assert not output.exists()
