"""The model card: metadata that the hub's own reader takes, the licence of the original, and what a user must know."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from pages import NASTY, full_report
from tiny_checkpoints import CommandLine, run_stock_script

import layer_surgery
from layer_surgery import SurgeryReport
from layer_surgery.checkpoint.origin import hub_id, licence, origin
from layer_surgery.records.seal import is_unedited
from layer_surgery.reporting.card import model_card
from layer_surgery.reporting.text import code_span

Result = tuple[Path, SurgeryReport]
#: A layer removed outright, without data.
REMOVAL: dict[str, Any] = {"layers": [1], "keep": 0, "refit": False, "eval_data": None}


def with_card(model: Path, directory: Path, text: str | bytes | None, **files: str) -> Path:
    """Return a copy of a model with a card and other files beside it."""
    shutil.copytree(model, directory)
    if text is not None:
        (directory / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")
    return directory


def test_the_hubs_reader_takes_the_card(result: Result) -> None:
    card = ModelCard.load(result[0] / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"layer-surgery", "pruning", "low-rank", "custom_code"} <= set(card.data.tags)
    assert card.data.model_name == "smaller"
    (found,) = card.data.eval_results
    (name,) = result[1].after.perplexity
    assert (found.metric_type, found.dataset_name) == ("perplexity", name)
    assert found.metric_value == pytest.approx(result[1].after.perplexity[name].value, abs=1e-4)
    assert "base_model" not in card.data.to_dict() and "license" not in card.data.to_dict()


def test_the_card_says_how_to_load_what_it_saw_and_what_made_it(result: Result) -> None:
    text = (result[0] / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("smaller", dtype="auto", trust_remote_code=True)' in text
    assert "names none either" in text and "--base-model OWNER/NAME" in text
    first, second = (layer.index for layer in result[1].plan.low_rank)
    assert f"Replaced linears of 2 of 5 layers ({first}, {second}) by low-rank components" in text
    assert "16 sequences, 256 tokens" in text.partition("calibrated on")[2]
    assert "From Python; the settings are in" in text
    command = {"command": "layer-surgery compress ```model```"}
    text = model_card(replace(result[1], provenance=result[1].provenance | command), "x", needs_code=True)
    assert "````\nlayer-surgery compress ```model```\n````" in text


@pytest.mark.slow
def test_the_code_in_the_card_runs_where_only_transformers_is(result: Result, tmp_path: Path) -> None:
    shutil.copytree(result[0], tmp_path / "smaller")  # the card's name for it, relative to where the script runs
    script = """
import json, pathlib, re
code = re.search(r"```python\\n(.*?)```", pathlib.Path("smaller/README.md").read_text(), re.DOTALL)[1]
exec(code)
tokens = tokenizer("the")["input_ids"]
print("\\n" + json.dumps([type(model).__name__, sum(p.numel() for p in model.parameters()), len(tokens)]))
"""
    name, parameters, tokens = run_stock_script(script, home=tmp_path)
    assert (name, parameters) == ("LayerSurgeryForCausalLM", result[1].after.parameters) and tokens > 0


def test_a_plain_result_needs_no_code(model: Path, tmp_path: Path) -> None:
    layer_surgery.compress(model, tmp_path / "out", **REMOVAL)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code" not in text and "custom_code" not in text and "plain checkpoint" in text
    assert "No data." in text.partition("calibrated on")[2][:20]
    assert ModelCard(text).data.eval_results is None


def test_names_on_the_hub_become_the_base_model(run: CommandLine, copy: Path) -> None:
    assert run("report", copy, "--base-model", "owner/name").code == 0
    card = ModelCard.load(copy / "README.md")
    assert card.data.base_model == "owner/name"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "[owner/name](https://huggingface.co/owner/name)" in card.text


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("/cache/models--owner--name/snapshots/0123", "owner/name"),
        ("/cache/models--gpt2/snapshots/0123", None),
        ("/models/owner/name", None),
        ("/cache/models--../snapshots", None),
    ],
)
def test_a_snapshot_of_the_hub_knows_its_name(directory: str, name: str | None) -> None:
    assert hub_id(Path(directory)) == name


def test_the_name_of_a_snapshot_does_not_depend_on_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id(Path("/cache/models--owner--name/snapshots/0123")) == "owner/name"
    assert origin(None, "owner/name")["hub_id"] is None  # a path


def test_a_model_in_memory_may_say_where_it_is_from() -> None:
    assert origin(None, "owner/name") == {"hub_id": "owner/name", "licence": {}}
    assert origin(None, "/home/me/model")["hub_id"] is origin(None, "")["hub_id"] is None


def test_the_licence_is_that_of_the_originals_card(model: Path, tmp_path: Path) -> None:
    base = with_card(model, tmp_path / "base", "---\nlicense: mit\ntags: [x]\n---\n# Base\n", LICENSE="MIT text")
    report = layer_surgery.compress(base, tmp_path / "out", **REMOVAL)
    assert report.base_model["licence"] == {"license": "mit"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and "as its model card says: `mit`" in card.text
    assert "# Base" not in card.text
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT text"


def test_a_licence_file_is_pointed_at(model: Path, tmp_path: Path) -> None:
    base = with_card(model, tmp_path / "base", None, LICENSE="Ask us.")
    layer_surgery.compress(base, tmp_path / "out", **REMOVAL)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert (tmp_path / "out" / "LICENSE").is_file()


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "---\n- list\n---\n",
        b"---\nlicense: \xff\n---\n",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        "",
    ],
    ids=repr,
)
def test_a_damaged_card_of_the_original_is_none(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert licence(tmp_path) == {}


def test_hostile_names_do_not_break_the_card(result: Result) -> None:
    report = full_report(result[1], NASTY)
    licence = {"license": "other", "license_name": "same-as-base-model", "license_link": NASTY}
    report = replace(report, base_model=report.base_model | {"licence": licence, "hub_id": f"a/b {NASTY}"})
    text = model_card(report, NASTY, needs_code=True)
    card = ModelCard(text)
    (line,) = (line for line in card.text.splitlines() if line.startswith("That of the original"))
    assert line == f"That of the original: see {code_span(NASTY)}."
    assert "huggingface.co" not in card.text and card.data.base_model is None
    assert card.data.model_name and card.data.eval_results
    assert "<script>alert" not in card.text.replace("`", "").partition("## Results")[2].partition("## What")[0]
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
    text.encode("utf-8")


def test_a_task_and_a_text_of_one_name_stay_two_results(result: Result) -> None:
    report = full_report(result[1])
    (name, perplexity), task = next(iter(report.after.perplexity.items())), next(iter(report.after.tasks.values()))
    report = replace(report, after=replace(report.after, perplexity={name: perplexity}, tasks={name: task}))
    results = ModelCard(model_card(report, "x", needs_code=False)).data.to_dict()["model-index"][0]["results"]
    types = [[metric["type"] for metric in entry["metrics"]] for entry in results]
    assert types == [["perplexity"], ["accuracy", "accuracy"]]


def test_any_change_of_a_card_is_seen(result: Result) -> None:
    card = (result[0] / "README.md").read_text(encoding="utf-8")
    assert is_unedited(card)
    assert not is_unedited(card.replace("smaller", "greater", 1))
    assert not is_unedited(card + "more\n")
    assert not is_unedited("# Another card\n")
