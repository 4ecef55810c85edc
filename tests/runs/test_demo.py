"""On a trained model: the report says what stock transformers measure, and good choices do better than bad ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import DEMO, run_stock_script
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import layer_surgery
from layer_surgery import SurgeryReport
from layer_surgery.data import load_documents

pytestmark = pytest.mark.slow

Result = tuple[Path, SurgeryReport]

LENGTH = 256
WINDOWS = 8
OPTIONS: dict[str, Any] = {"target_layers": 9, "scorer": "block_influence", "samples": 16}
OPTIONS |= {"sequence_length": LENGTH, "eval_windows": WINDOWS}

#: Perplexity by plain transformers in float32, of a whole model at once, where this package cannot be imported.
PLAIN = """
import json, math, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

windows = load_file(sys.argv[1])["windows"]
results = {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
    total = count = 0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    results[path] = [math.exp(total / count), count]
print("\\n" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Compress the demo model to nine layers by each way."""
    directory = tmp_path_factory.mktemp("demo")
    ways: dict[str, Any] = {"removed": {"keep": 0, "refit": False}, "default": {"keep": 0.1}}
    ways["grasp"] = {"keep": 0.1, "method": "grasp"}
    return {
        name: (directory / name, layer_surgery.compress(DEMO, directory / name, **OPTIONS, **way))
        for name, way in ways.items()
    }


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Return the windows that perplexity is measured on, cut here by hand from the bundled text."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"], "there is a BOS"
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    stream: list[int] = []
    for document in load_documents("bundled", part="evaluation").documents:
        stream += (separator if stream else []) + tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return torch.tensor(stream[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@pytest.fixture(scope="module")
def plain(
    outputs: dict[str, Result], windows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[float, int]]:
    home = tmp_path_factory.mktemp("home")
    save_file({"windows": windows}, home / "windows.safetensors")
    paths = {"original": DEMO} | {name: path for name, (path, _) in outputs.items()}
    results = run_stock_script(PLAIN, home / "windows.safetensors", *paths.values(), home=home)
    return {name: tuple(results[str(path)]) for name, path in paths.items()}


@pytest.mark.parametrize("way", ["removed", "default", "grasp"])
def test_the_reported_perplexity_is_what_plain_transformers_measure(
    outputs: dict[str, Result], plain: dict[str, tuple[float, int]], way: str
) -> None:
    measured = outputs[way][1].after.perplexity["bundled"]
    value, tokens = plain[way]
    assert measured.tokens == tokens == WINDOWS * (LENGTH - 1)
    assert measured.value == pytest.approx(value, rel=1e-5)


def test_the_reported_perplexity_before_is_what_plain_transformers_measure(
    outputs: dict[str, Result], plain: dict[str, tuple[float, int]]
) -> None:
    values = [report.before.perplexity["bundled"].value for _, report in outputs.values()]
    assert values == pytest.approx([plain["original"][0]] * 3, rel=1e-5)
    assert len(set(values)) == 1


def test_removing_costs_perplexity_and_low_rank_components_are_better_than_nothing(outputs: dict[str, Result]) -> None:
    for _, report in outputs.values():
        before, after = report.before.perplexity["bundled"], report.after.perplexity["bundled"]
        assert before.stderr is not None and before.stderr > 0
        assert after.value > before.value > 1
    values = {name: report.after.perplexity["bundled"].value for name, (_, report) in outputs.items()}
    assert values["default"] < values["removed"]
    assert values["grasp"] < values["removed"]


@pytest.mark.parametrize("way", ["default", "grasp"])
def test_parameters_are_as_planned_and_within_the_budget(outputs: dict[str, Result], way: str) -> None:
    output, report = outputs[way]
    original: PreTrainedModel = AutoModelForCausalLM.from_pretrained(DEMO)
    layer = sum(parameter.numel() for parameter in original.get_submodule("model.layers.0").parameters())
    bound = original.num_parameters() - 3 * layer + math.floor(0.1 * 3 * layer)
    parameters = layer_surgery.load(output).num_parameters()
    assert parameters == report.plan.parameters == report.after.parameters
    assert report.plan.parameter_bound == bound
    # The cheapest step: a rank of the key and value projections, or 16 of these, or 16 channels.
    assert 0 <= bound - parameters < (16 * min(128 + 256, 3 * 256) if way == "default" else 128 + 256)


def test_all_ways_operate_on_the_same_layers(outputs: dict[str, Result]) -> None:
    chosen = [[layer.index for layer in report.plan.operated] for _, report in outputs.values()]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 3


def test_the_layers_that_block_influence_names_are_worth_less_than_the_first() -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "target_layers"} | {"keep": 0, "no_save": True}
    chosen = layer_surgery.compress(DEMO, target_layers=11, **options)
    del options["scorer"]
    first = layer_surgery.compress(DEMO, layers=[0], **options)
    assert chosen.plan.operated[0].index != 0
    values = [report.after.perplexity["bundled"].value for report in (chosen, first)]
    assert values[0] < 0.5 * values[1]
