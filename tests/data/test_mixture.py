"""Several calibration sources: the rows they become, the report, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, listing, strict_json, text_file
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

import layer_surgery
from layer_surgery.config import CalibrationConfig
from layer_surgery.data import Chat, Example, LoadedData, Text, pack_calibration, pack_mixture
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.data.weights import apportion
from layer_surgery.errors import DataError, UserError

TEXT = LoadedData("numbers.txt", [Text(" ".join(str(n) for n in range(300)))], "text")
SUMS = LoadedData("sums.csv", [Example(f"{n} and {n}?", f"{2 * n}!") for n in range(40)], "example")
CHATS = LoadedData(
    "chats.jsonl",
    [Chat([{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "the fox"}]) for n in range(10, 30)],
    "chat",
)
LENGTH = 64


def mix(data: list[LoadedData], weights: list[float], samples: int, seed: int = 0) -> PackedTokens:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    return pack_mixture(data, weights, tokenizer, samples=samples, sequence_length=LENGTH, seed=seed)


def rows_of(tokens: PackedTokens) -> list[tuple[tuple[int, ...], ...]]:
    """Each row as ids, loss mask and validity together."""
    parts = (tokens.token_ids, tokens.loss_mask, tokens.valid)
    return [tuple(tuple(part[number].tolist()) for part in parts) for number in range(tokens.sequences)]


def every_row_of(data: LoadedData) -> set[tuple[tuple[int, ...], ...]]:
    """All windows of a text, drawn without the mixture's code."""
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError) as caught:
        pack_calibration(data, tokenizer, samples=10_000, sequence_length=LENGTH, seed=0)
    match = re.search(r"which make (\d+) windows", str(caught.value))
    assert match
    return set(rows_of(pack_calibration(data, tokenizer, samples=int(match[1]), sequence_length=LENGTH, seed=0)))


# Packing


@pytest.mark.parametrize("data", [TEXT, SUMS], ids=["text", "examples"])
@pytest.mark.parametrize("weight", [1.0, 3.5])
def test_a_lone_source_is_packed_as_if_there_were_no_mixtures(data: LoadedData, weight: float) -> None:
    for seed in (0, 7):
        alone = pack_calibration(data, tiny_tokenizer(), samples=5, sequence_length=LENGTH, seed=seed)
        mixed = mix([data], [weight], 5, seed)
        assert rows_of(mixed) == rows_of(alone)
        assert (mixed.name, mixed.sha256, mixed.tokens_available) == (alone.name, alone.sha256, alone.tokens_available)
        (source,) = mixed.sources
        assert (source.name, source.weight, source.sequences) == (data.name, weight, 5)
        assert source.sha256 == alone.sha256 and source.predicted_tokens == alone.predicted_tokens


def test_a_mixture_of_all_kinds() -> None:
    tokens = mix([TEXT, SUMS, CHATS], [3, 2, 1], 12)
    assert tokens.name == "numbers.txt:3 + sums.csv:2 + chats.jsonl:1"
    assert tokens.token_ids.shape == (12, LENGTH) and tokens.token_ids.dtype == torch.int64
    assert [source.sequences for source in tokens.sources] == [6, 4, 2]
    assert [source.weight for source in tokens.sources] == [3, 2, 1]
    windows = every_row_of(TEXT)
    rows = rows_of(tokens)
    assert sum(row in windows for row in rows) == 6, "rows of text keep their ids and their masks"
    assert len(set(rows)) == 12
    decoded = {"sums.csv": 0, "chats.jsonl": 0}
    tokenizer = tiny_tokenizer()
    for number, row in enumerate(rows):
        if row not in windows:
            answers = tokenizer.decode(tokens.token_ids[number][tokens.loss_mask[number]])
            if "<eos>" in answers:
                decoded["sums.csv"] += 1
                assert re.fullmatch(r"( \d+!<eos>)+", answers)
            else:
                decoded["chats.jsonl"] += 1
                assert re.fullmatch(r"(the fox<\|end\|>\n)+", answers)
    assert decoded == {"sums.csv": 4, "chats.jsonl": 2}


def test_what_each_source_gives_adds_up() -> None:
    tokens = mix([TEXT, SUMS], [1, 1], 8)
    text, sums = tokens.sources
    assert text.tokens == 4 * LENGTH and text.predicted_tokens == 4 * (LENGTH - 1)
    assert 0 < sums.predicted_tokens < sums.tokens < 4 * LENGTH
    assert text.tokens + sums.tokens == int(tokens.valid.sum())
    assert text.predicted_tokens + sums.predicted_tokens == tokens.predicted_tokens
    available = [mix([data], [1], 1).tokens_available for data in (TEXT, SUMS)]
    assert [text.tokens_available, sums.tokens_available] == available
    assert tokens.tokens_available == sum(available)
    assert len({tokens.sha256, text.sha256, sums.sha256}) == 3


def test_rows_are_interleaved() -> None:
    windows = every_row_of(TEXT)
    orders = [[row in windows for row in rows_of(mix([TEXT, SUMS], [1, 1], 12, seed))] for seed in range(5)]
    assert all(sum(order) == 6 for order in orders)
    assert all(order not in ([True] * 6 + [False] * 6, [False] * 6 + [True] * 6) for order in orders)
    assert len({tuple(order) for order in orders}) > 1, "the order is the seed's"


def test_the_seed_decides_the_mixture() -> None:
    first, again, other = (mix([TEXT, SUMS], [1, 1], 8, seed) for seed in (1, 1, 2))
    assert rows_of(first) == rows_of(again) and first.sha256 == again.sha256
    assert set(rows_of(first)) != set(rows_of(other)), "not only their order"
    assert first.sha256 != other.sha256


def test_each_source_has_a_seed_of_its_own() -> None:
    tokenizer = tiny_tokenizer()
    parts = mix([TEXT, replace(TEXT, name="same.txt")], [1, 1], 8).sources
    assert parts[0].sha256 != parts[1].sha256, "the same windows of two texts of one length would be no draw"
    alone = pack_calibration(TEXT, tokenizer, samples=4, sequence_length=LENGTH, seed=0).sha256
    assert alone not in {part.sha256 for part in parts}


def test_the_hash_is_over_the_order_too_and_not_over_names() -> None:
    tokens = mix([TEXT, SUMS], [1, 1], 8)
    assert mix([replace(TEXT, name="x"), SUMS], [2, 2], 8).sha256 == tokens.sha256
    assert mix([SUMS, TEXT], [1, 1], 8).sha256 != tokens.sha256


def test_mixing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    mix([TEXT, SUMS], [1, 1], 4)
    assert torch.equal(before, torch.get_rng_state())


# Too little of one source


@pytest.mark.parametrize("weights", [[1.0, 4.0], [3.0, 1.0], [2.0, 2.0]])
@pytest.mark.parametrize("seed", [0, 1])
def test_too_few_rows_for_a_share_name_the_source_and_the_limits(weights: list[float], seed: int) -> None:
    data = [LoadedData("long.txt", [Text("the fox " * 4000)], "text"), SUMS]
    with pytest.raises(DataError) as caught:
        mix(data, weights, 100, seed)
    share = apportion(weights, 100)[1]
    message = str(caught.value)
    match = re.match(r"sums.csv has [\d,]+ tokens, which make (\d+) rows of whole examples at --sequence-l", message)
    assert match
    count = int(match[1])
    assert count < share
    assert f"fewer than its share of --samples 100, which is {share}; " in message
    samples = int(message.partition("lower --samples to at most ")[2].partition(",")[0])
    weight = float(message.partition(f"or its weight (now {weights[1]:g}) to at most ")[2].partition(",")[0])
    assert mix(data, weights, samples, seed).sources[1].sequences == count
    assert mix(data, [weights[0], weight], 100, seed).sources[1].sequences == count
    more = samples + math.ceil(sum(weights) / weights[1])  # one more for sums.csv
    for other_weights, other_samples in ((weights, more), ([weights[0], weight * 1.2], 100)):
        with pytest.raises(DataError, match=r"sums\.csv has .* fewer than its share"):
            mix(data, other_weights, other_samples, seed)


def test_a_source_without_any_sequence_is_not_told_to_take_none() -> None:
    short = LoadedData("short.txt", [Text("the fox")], "text")
    with pytest.raises(DataError, match=r"short.txt has .* which make 0 windows .* which is 2; lower --sequence-l"):
        mix([TEXT, short], [1, 1], 4)


def test_advice_on_samples_never_goes_below_one_each() -> None:
    few = replace(SUMS, documents=SUMS.documents[:1])
    with pytest.raises(DataError, match=r"lower --samples to at most 3, or its weight \(now 8\) to at most 0\.\d"):
        mix([TEXT, few, CHATS], [1, 8, 1], 5)
    assert [source.sequences for source in mix([TEXT, few, CHATS], [1, 8, 1], 3).sources] == [1, 1, 1]


def test_another_error_in_one_source_names_it() -> None:
    long = LoadedData("long.csv", [Example("the fox " * 100, "yes")], "example")
    with pytest.raises(DataError, match=r"^long\.csv, example 1 has .* more than --sequence-length"):
        mix([TEXT, long], [1, 1], 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"calibration": ("a", "b", "c"), "samples": 2}, "--samples is 2, but --calibration names 3 sources"),
        ({"calibration": ()}, "--calibration names no data"),
    ],
)
def test_more_sources_than_samples_and_none_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        CalibrationConfig(**options)
    assert CalibrationConfig(calibration=("a", "b", "c"), samples=3).samples == 3


# From the command line to the report


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    task = "".join(json.dumps({"prompt": f"{n} and {n}?", "answer": f"{2 * n}!"}) + "\n" for n in range(40))
    (tmp_path / "task.jsonl").write_text(task)
    (tmp_path / "body.csv").write_text("body\n" + "the answer is the other thing\n" * 60)
    text_file(tmp_path / "text.txt")
    return {name: str(tmp_path / name) for name in ("task.jsonl", "body.csv", "text.txt")}


def test_the_report_and_the_notes_list_every_source(
    run: CommandLine, model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    task, text, output = files["task.jsonl"], files["text.txt"], tmp_path / "output"
    data = ["--calibration", f"{task}:2", "--calibration", text, "--samples", 6, "--sequence-length", 32]
    arguments = ["--layers", 1, "--keep", 0.3, "--no-refit", "--no-eval", "--output", output]
    outcome = run("compress", model, *data, *arguments)
    assert outcome.code == 0, outcome.err
    report = strict_json((output / "surgery.json").read_text())
    block = report["calibration"]
    assert block["name"] == f"{task}:2 + {text}:1" and block["sequences"] == 6
    first, second = block["sources"]
    keys = ["name", "weight", "sequences", "tokens_available", "tokens", "predicted_tokens", "sha256"]
    assert list(first) == list(second) == keys
    assert (first["name"], first["weight"], first["sequences"]) == (task, 2, 4)
    assert (second["name"], second["weight"], second["sequences"]) == (text, 1, 2)
    for key in ("tokens", "predicted_tokens", "sequences", "tokens_available"):
        assert first[key] + second[key] == block[key]
    assert report["provenance"]["config"]["calibration"] == ["task.jsonl:2", "text.txt"]
    first_note, second_note = outcome.error_lines[:2]
    part = 100 * first["predicted_tokens"] / block["predicted_tokens"]
    assert first_note == (
        f"calibration: {first['tokens']} of the {first['tokens_available']} tokens of '{task}' (weight 2), as 4 x 32; "
        f"{first['predicted_tokens']} carry loss, {part:.1f} % of all that do"
    )
    assert second_note.endswith(
        f" tokens of '{text}' (weight 1), as 2 x 32; 62 carry loss, {100 - part:.1f} % of all that do"
    )


def test_a_lone_source_is_listed_and_its_note_has_no_weight(model: Path, files: dict[str, str]) -> None:
    notes: list[str] = []
    options: dict[str, Any] = {"layers": [1], "method": "fisher", "eval_data": None, "no_save": True}
    options |= {"samples": 4, "sequence_length": 32, "ui": layer_surgery.runs.session.Ui(note=notes.append)}
    reports = [
        layer_surgery.compress(model, calibration=data, **options)
        for data in (files["text.txt"], Path(files["text.txt"]), [files["text.txt"]], f"{files['text.txt']}:9")
    ]
    blocks = [report.calibration for report in reports]
    assert blocks[0] is not None and blocks[0] == blocks[1] == blocks[2]
    assert blocks[0]["name"] == files["text.txt"] and len(blocks[0]["sources"]) == 1
    assert blocks[3] is not None and blocks[3]["sources"][0]["weight"] == 9
    assert blocks[3]["sha256"] == blocks[0]["sha256"] == blocks[0]["sources"][0]["sha256"]
    about_data = {note for note in notes if note.startswith("calibration: ")}
    assert len(about_data) == 1 and about_data.pop().endswith("as 4 x 32; 124 carry loss")
    assert len({json.dumps(report.plan.to_dict()) for report in reports}) == 1


def test_the_column_applies_to_the_sources_that_have_columns(model: Path, files: dict[str, str]) -> None:
    options: dict[str, Any] = {"samples": 4, "sequence_length": 32, "text_column": "body"}
    scores = layer_surgery.score(model, calibration=[f"{files['body.csv']}:1", f"{files['text.txt']}:1"], **options)
    assert scores.tokens == 4 * 32
    with pytest.raises(DataError, match=r"--text-column body applies to none of .*text\.txt, bundled, which have no"):
        layer_surgery.score(model, calibration=[f"{files['text.txt']}:2", "bundled:1"], **options)
    with pytest.raises(DataError, match="--text-column body applies to none of bundled, which have no columns"):
        layer_surgery.compress(model, no_save=True, target_layers=1, **options)
    with pytest.raises(DataError, match=r"task\.jsonl has no column 'body'"):
        layer_surgery.score(model, calibration=[files["body.csv"], files["task.jsonl"]], **options)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["text.txt", "text.txt:2"], "text.txt' more than once"),
        (["text.txt:0"], "has the weight 0; allowed"),
        (["text.txt", "task.jsonl:some"], "'some' is not a weight"),
        (["text.txt", "none.jsonl"], "there is no file none.jsonl"),
        (["text.txt", "body.csv"], "body.csv has the columns body, but needs"),
        (["text.txt:1", "task.jsonl:9"], "task.jsonl has"),
        (["text.txt", "task.jsonl", "bundled", "body.csv", "c4"], "--samples is 4, but --calibration names 5 sources"),
    ],
)
def test_a_wrong_mixture_is_refused_and_leaves_nothing(
    run: CommandLine, model: Path, files: dict[str, str], tmp_path: Path, sources: list[str], expected: str
) -> None:
    before = listing(tmp_path)
    data = [item for source in sources for item in ("--calibration", str(tmp_path / source))]
    if "none.jsonl" in sources:
        data[-1] = "none.jsonl"
    if sources[-1].endswith(":9"):
        (tmp_path / "task.jsonl").write_text('{"prompt": "1 and 1?", "answer": "2!"}\n')
        before = listing(tmp_path)
    data += ["--samples", "4", "--sequence-length", "32"]
    outcome = run("compress", model, "--target-layers", 2, *data, "--no-eval", "--output", tmp_path / "new" / "output")
    assert (outcome.code, outcome.out) == (2, "")
    (message,) = outcome.error_lines
    assert message.startswith("error: ") and expected in message, message
    assert listing(tmp_path) == before


def test_a_mixture_of_task_and_text_gives_the_same_again_and_other_weights_than_text(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layers": [1], "keep": 0.3, "eval_data": None, "samples": 6, "sequence_length": 64}
    mixed = [f"{files['task.jsonl']}:1", "bundled:2"]
    reports = {
        name: layer_surgery.compress(model, tmp_path / name, calibration=data, **options)
        for name, data in (("mixed", mixed), ("again", mixed), ("text", "bundled"))
    }
    blocks = {name: report.calibration for name, report in reports.items()}
    assert blocks["mixed"] is not None and blocks["mixed"] == blocks["again"]
    assert [source["sequences"] for source in blocks["mixed"]["sources"]] == [2, 4]
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in reports}
    assert weights["mixed"] == weights["again"] != weights["text"]
