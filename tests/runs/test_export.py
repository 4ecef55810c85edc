"""`export --dense`: a plain checkpoint that computes what the low-rank one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import (
    DEMO,
    CommandLine,
    edit_tensors,
    listing,
    load_stock,
    logits,
    saved_model,
    strict_json,
    tensors_of,
)
from tiny_families import LAYERS
from tiny_models import full_ranks, make_test_plan

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import CheckpointError, LayerSurgeryError, NumericalError, OutputError
from layer_surgery.runs.export import MultipliedSource

IDS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(0))


def low_rank(directory: Path, model_type: str = "llama", *, max_shard_size: str = "1GB", **fields: object) -> Path:
    """Compress a tiny model: one layer goes, one gets half of its ranks, and one loses its attention."""
    layers = LAYERS.get(model_type, 5)
    path = saved_model(directory / "model", model_type, layers=layers, max_shard_size=max_shard_size, **fields)
    checkpoint = open_checkpoint(path)
    halves = {name: rank // 2 for name, rank in full_ranks(checkpoint, 2).items()}
    attention = checkpoint.architecture.linears_of("attention")
    removed = {name: 0 for name in full_ranks(checkpoint, 3) if name in attention}
    assert halves and removed
    plan = make_test_plan(layers, removed=[0], low_rank={2: halves, 3: removed})
    layer_surgery.compress(path, directory / "low rank", plan=plan, eval_data=None)
    return directory / "low rank"


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "gemma3_text", "starcoder2", "falcon", "qwen2_moe"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_is_a_plain_checkpoint_with_the_same_logits(tmp_path: Path, model_type: str, tied: bool) -> None:
    source = low_rank(tmp_path, model_type, tied=tied)
    record = layer_surgery.export_dense(source, tmp_path / "dense")
    model, info = load_stock(tmp_path / "dense")
    assert not any(len(keys) for keys in info.values())
    original = load_stock(tmp_path / "model")[0]
    assert type(model) is type(original)
    assert model.config.num_hidden_layers == original.config.num_hidden_layers - 1 == record.layers
    assert model.num_parameters() == record.parameters > record.parameters_before
    expected = logits(layer_surgery.load(source), IDS)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
    assert len(expected.unique()) > 1000
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    source = low_rank(tmp_path, dtype=dtype)
    layer_surgery.export_dense(source, tmp_path / "dense")
    factors, dense = tensors_of(source), tensors_of(tmp_path / "dense")
    compared = 0
    for name in open_checkpoint(source).low_rank:
        left, right = factors[f"{name}.out_factor.weight"], factors[f"{name}.in_factor.weight"]
        assert torch.equal(dense[f"{name}.weight"], (left.double() @ right.double()).to(dtype)), name
        compared += bool(dense[f"{name}.weight"].any())
    assert compared >= 7
    rest = {name for name in factors if "_factor" not in name}
    assert all(torch.equal(factors[name], dense[name]) for name in rest)
    assert {tensor.dtype for tensor in dense.values()} == {dtype}


def test_a_removed_attention_becomes_zeros_and_keeps_its_bias(tmp_path: Path) -> None:
    source = low_rank(tmp_path, "starcoder2", use_bias=True)
    record = layer_surgery.export_dense(source, tmp_path / "dense")
    dense, before = tensors_of(tmp_path / "dense"), tensors_of(source)
    name = "model.layers.2.self_attn.o_proj"  # layer 3 before the first went
    assert not dense[f"{name}.weight"].any()
    assert dense[f"{name}.bias"].any() and torch.equal(dense[f"{name}.bias"], before[f"{name}.bias"])
    assert record.removed_linears == 4 < record.linears


def test_what_travels_with_the_weights_comes_along(tmp_path: Path) -> None:
    source = low_rank(tmp_path)
    (source / "LICENSE").write_text("Do as you like.\n")
    record = layer_surgery.export_dense(source, tmp_path / "dense", command="layer-surgery export ...")
    before, after = listing(source), listing(tmp_path / "dense")
    # Page and card say that it is an export; the code is not needed any more.
    changed = {"config.json", "model.safetensors", "surgery.json", "report.html", "README.md"}
    left = {*changed, "modeling_layer_surgery.py"}
    assert {name: digest for name, digest in before.items() if name not in left} == {
        name: digest for name, digest in after.items() if name not in changed
    }
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = strict_json((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and config["num_hidden_layers"] == 4
    report = strict_json((tmp_path / "dense" / "surgery.json").read_text())
    exported = report.pop("dense_export")
    files = report.pop("files")
    original = strict_json((source / "surgery.json").read_text())
    assert {**report, "files": original["files"]} == original
    assert files.keys() == after.keys() - {"surgery.json"}
    assert files["config.json"]["sha256"] == after["config.json"]
    assert exported["source"] == str(source) and exported["linears"] == record.linears
    assert exported["provenance"]["command"] == "layer-surgery export ..."
    assert not list((tmp_path / "dense").glob("*.py"))


def test_a_sharded_checkpoint_gives_shards_of_the_same_size(tmp_path: Path) -> None:
    source = low_rank(tmp_path, max_shard_size="45KB")
    layer_surgery.export_dense(source, tmp_path / "dense")
    largest = [
        max(file.stat().st_size for file in directory.glob("*.safetensors"))
        for directory in (source, tmp_path / "dense")
    ]
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert largest[1] <= largest[0] + 2000  # headers differ
    torch.testing.assert_close(
        logits(load_stock(tmp_path / "dense")[0], IDS), logits(layer_surgery.load(source), IDS), rtol=1e-4, atol=1e-4
    )


def test_a_result_that_was_saved_again_without_its_report_is_exported_too(tmp_path: Path) -> None:
    model = layer_surgery.load(low_rank(tmp_path))
    model.save_pretrained(tmp_path / "again")
    layer_surgery.export_dense(tmp_path / "again", tmp_path / "dense")
    assert list(strict_json((tmp_path / "dense" / "surgery.json").read_text())) == ["files", "dense_export"]
    torch.testing.assert_close(logits(load_stock(tmp_path / "dense")[0], IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


def test_no_more_than_one_matrix_is_multiplied_out_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = low_rank(tmp_path)
    asked: list[list[str]] = []
    read = MultipliedSource.read

    def noted(self: MultipliedSource, names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        asked.append(list(names))
        return read(self, names, device)

    monkeypatch.setattr(MultipliedSource, "read", noted)
    layer_surgery.export_dense(source, tmp_path / "dense")
    assert asked and all(len(names) == 1 for names in asked)


@pytest.mark.parametrize("ranks", ["rank 1", "default"])
def test_it_has_a_page_and_a_card_that_say_what_it_is(tmp_path: Path, ranks: str) -> None:
    path, source = saved_model(tmp_path / "model", layers=4), tmp_path / "smaller"
    if ranks == "default":
        layer_surgery.compress(path, source, target_layers=3, samples=8, sequence_length=32, eval_data=None)
    else:
        ones = dict.fromkeys(full_ranks(open_checkpoint(path), 2), 1)
        layer_surgery.compress(path, source, plan=make_test_plan(4, low_rank={2: ones}), eval_data=None)
    record = layer_surgery.export_dense(source, tmp_path / "dense")
    for name in ("report.html", "README.md"):
        text = (tmp_path / "dense" / name).read_text(encoding="utf-8")
        assert f"dense export with {record.parameters:,} parameters" in text
        assert f"which has {record.parameters_before:,}" in text
    assert "trust_remote_code" not in text and "plain checkpoint of its architecture" in text


# The command, and what it refuses


def test_the_command_says_what_it_did(run: CommandLine, tmp_path: Path) -> None:
    source = low_rank(tmp_path)
    outcome = run("export", source, "--dense", "--output", tmp_path / "dense")
    assert (outcome.code, outcome.err) == (0, "multiplying factors out\n")
    assert "11 low-rank linears multiplied out, 4 of them zero (removed)" in outcome.out
    assert str(tmp_path / "dense") in outcome.out
    outcome = run("export", source, "--dense", "--output", tmp_path / "dense", "--overwrite", "--json")
    assert json.loads(outcome.out)["linears"] == 11
    assert run("export", tmp_path / "dense", "--dense", "--output", tmp_path / "again").code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("LOW --output NEW", "--dense"),
        ("LOW --dense", "give --output"),
        ("LOW --dense --output LOW", "is the model itself"),
        ("LOW --dense --output LOW --overwrite", "is the model itself"),
        ("LOW --dense --output MODEL", "exists already"),
        ("LOW --dense --output MODEL --overwrite", "not a result of Layer Surgery"),
        ("MODEL --dense --output NEW", "is a plain checkpoint (model_type: llama)"),
        ("NOWHERE --dense --output NEW", "no such model"),
        ("LOW/config.json --dense --output NEW", "is a file"),
    ],
)
def test_what_cannot_be_exported_is_refused(run: CommandLine, tmp_path: Path, arguments: str, expected: str) -> None:
    low_rank(tmp_path)
    before = listing(tmp_path)
    names = {"LOW": "low rank", "MODEL": "model", "NEW": "new/dense", "NOWHERE": "nowhere"}
    given = []
    for argument in arguments.split():
        head, slash, tail = argument.partition("/")
        given.append(f"{tmp_path / names[head]}{slash}{tail}" if head in names else argument)
    outcome = run("export", *given)
    assert outcome.code == 2 and expected in outcome.error_lines[-1], outcome.err
    assert len(outcome.error_lines) == 1 and outcome.out == ""
    assert listing(tmp_path) == before


def test_a_product_that_overflows_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = low_rank(tmp_path, dtype=torch.float16)
    name = "model.layers.1.mlp.up_proj"
    edit_tensors(
        source,
        lambda tensors: [tensors[f"{name}.{part}.weight"].fill_(300.0) for part in ("in_factor", "out_factor")],  # type: ignore[arg-type]
    )
    before = listing(tmp_path)
    with pytest.raises(NumericalError, match=rf"factors of '{name}' is not finite in torch.float16"):
        layer_surgery.export_dense(source, tmp_path / "dense")
    assert listing(tmp_path) == before


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = low_rank(tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(LayerSurgeryError, match="has 1,000 free"):
        layer_surgery.export_dense(source, tmp_path / "dense")
    assert listing(tmp_path) == before


def test_a_damaged_low_rank_checkpoint_is_refused(tmp_path: Path) -> None:
    source = low_rank(tmp_path)
    edit_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.in_factor.weight"))
    with pytest.raises(CheckpointError, match="in_factor"):
        layer_surgery.export_dense(source, tmp_path / "dense")
    with pytest.raises(OutputError, match="holds the model"):
        layer_surgery.export_dense(source, source.parent, overwrite=True)


@pytest.mark.parametrize(
    "text", ["[1]", "{", "[" * 100_000, '{"schema_version": 1, "x": NaN}'], ids=lambda text: text[:6]
)
def test_a_damaged_report_is_refused_before_anything_is_written(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    source = low_rank(tmp_path)
    (source / "surgery.json").write_text(text)
    before = listing(tmp_path)
    monkeypatch.setattr("layer_surgery.runs.export.save_checkpoint", lambda *_, **__: pytest.fail("it was written"))
    outcome = run("export", source, "--dense", "--output", tmp_path / "dense")
    assert outcome.code == 2 and "surgery.json is damaged" in outcome.error_lines[-1]
    assert len(outcome.error_lines) == 1 and listing(tmp_path) == before


@pytest.mark.slow
def test_the_demo_checkpoint_is_exported_within_rounding(tmp_path: Path) -> None:
    options = {"layers": [3, 7], "keep": 0.3, "method": "svd", "eval_data": None}
    layer_surgery.compress(DEMO, tmp_path / "low rank", **options)  # type: ignore[arg-type]
    layer_surgery.export_dense(tmp_path / "low rank", tmp_path / "dense")
    expected = logits(layer_surgery.load(tmp_path / "low rank", dtype=torch.float32), IDS)
    found = logits(layer_surgery.load(tmp_path / "dense", dtype=torch.float32), IDS)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())  # weights are in bfloat16
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.9
