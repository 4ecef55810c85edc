"""One compression from a directory to a directory: its report, its plan, and the same again for the same seed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import edit_json, listing, model_with_vocabulary, saved_model, strict_json, tensors_of, text_file
from tiny_models import full_ranks, make_test_plan
from tiny_tokenizer import tiny_tokenizer

import layer_surgery
from layer_surgery import LayerPlan, SurgeryReport
from layer_surgery.checkpoint.contents import PAGE_FILES
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import DataError, OutputError, PlanError
from layer_surgery.records import REPORT_SCHEMA_VERSION
from layer_surgery.scoring import SCORERS
from layer_surgery.surgeon import METHODS

SEQUENCE = 16
Options = dict[str, Any]
Result = tuple[Path, SurgeryReport]
Compress = Callable[..., SurgeryReport]
#: A tiny removal of one layer, without anything measured.
REMOVAL: Options = {"layers": [1], "keep": 0, "refit": False, "eval_data": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), layers=5)


@pytest.fixture(scope="module")
def options(text: Path) -> Options:
    data = {"calibration": text, "eval_data": [text], "samples": 6, "sequence_length": SEQUENCE}
    return {"target_layers": 3, "keep": 0.3, "method": "svd"} | data


@pytest.fixture(scope="module")
def compressed(model: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Result:
    output = tmp_path_factory.mktemp("compressed") / "output"
    return output, layer_surgery.compress(model, output, **options)


@pytest.fixture
def compress(model: Path, options: Options, tmp_path: Path) -> Compress:
    """Return what compresses the model with the options and more, into `name` in the test's folder or not at all."""
    return lambda name=None, **more: layer_surgery.compress(
        model, tmp_path / name if name else None, no_save=name is None, **options | more
    )


def read_report(output: Path) -> Options:
    report = strict_json((output / "surgery.json").read_text(encoding="utf-8"))
    assert isinstance(report, dict)
    return report


# The report


def test_report_on_disk_is_strict_json_with_all_its_fields(compressed: Result) -> None:
    report = read_report(compressed[0])
    assert report["schema_version"] == REPORT_SCHEMA_VERSION
    assert len(report["base_model"]["sha256"]) == 64
    assert report["plan"]["target_layers"] == 3
    assert all(
        layer.keys() == {"index", "action", "ranks", "channels", "heads", "experts", "routed", "bypass"}
        for layer in report["plan"]["layers"]
    )
    assert [layer["index"] for layer in report["plan"]["layers"]] == [0, 1, 2, 3, 4]
    assert report["scores"]["scorer"] == "fisher"
    assert len(report["scores"]["values"]) == 5
    assert {"open", "hash", "evaluate_before", "score", "operate", "evaluate_after", "save"} <= report["timings"].keys()
    assert report["peak_memory_bytes"] > 1 << 20
    assert {"time", "packages", "seed", "config", "command"} <= report["provenance"].keys()


def test_report_measures_the_model_before_and_after(compressed: Result, text: Path) -> None:
    report = read_report(compressed[0])
    for moment in ("before", "after"):
        measured = report[moment]["perplexity"][str(text)]
        assert measured["value"] > 1
        assert measured["stderr"] > 0
        assert measured["tokens"] > 200
        assert report[moment]["parameters"] > 0 and report[moment]["size_bytes"] > 0
    assert report["before"]["perplexity"][str(text)]["tokens"] == report["after"]["perplexity"][str(text)]["tokens"]


def test_report_on_disk_is_the_one_returned(compressed: Result) -> None:
    output, report = compressed
    expected = report.to_dict()
    assert expected.pop("output") == str(output)
    assert read_report(output) == json.loads(json.dumps(expected))


def test_reported_sizes_are_those_of_the_saved_model(compressed: Result, model: Path) -> None:
    output, report = compressed
    for moment, directory in ((report.before, model), (report.after, output)):
        loaded = layer_surgery.load(directory)
        assert moment.parameters == loaded.num_parameters()
        assert moment.layers == loaded.config.num_hidden_layers == 5
        assert moment.size_bytes == sum(tensor.nbytes for tensor in tensors_of(directory).values())
    assert report.plan.parameters == report.after.parameters


def test_parameters_are_within_the_budget(compressed: Result, model: Path) -> None:
    _, report = compressed
    loaded = layer_surgery.load(model)
    layer = sum(p.numel() for p in loaded.get_submodule("model.layers.0").parameters())
    bound = loaded.num_parameters() - 2 * layer + int(0.3 * 2 * layer)
    assert report.plan.parameter_bound == bound
    assert 0 <= bound - report.after.parameters < 32 + 12  # the cheapest rank


def test_a_removal_without_data_has_the_sizes_and_times_only_the_stages_that_ran(model: Path, tmp_path: Path) -> None:
    report = layer_surgery.compress(model, tmp_path / "output", **REMOVAL)
    assert not {"operate", "score", "refit"} & report.timings.keys()
    assert report.scores is None and report.calibration is None
    saved = read_report(tmp_path / "output")
    assert saved["before"]["perplexity"] == saved["after"]["perplexity"] == {}
    assert saved["after"]["layers"] == saved["before"]["layers"] - 1


def test_one_window_has_no_standard_error(compress: Compress, tmp_path: Path, text: Path) -> None:
    assert compress("output", eval_windows=1).after.perplexity[str(text)].stderr is None
    assert read_report(tmp_path / "output")["after"]["perplexity"][str(text)]["stderr"] is None


def test_several_texts_are_measured_each(compress: Compress, tmp_path: Path, text: Path) -> None:
    other = text_file(tmp_path / "other.txt", lines=9, seed=1)
    report = compress(eval_data=[text, other])
    assert list(report.after.perplexity) == [str(text), str(other)]
    assert len({measured.tokens for measured in report.after.perplexity.values()}) == 2


# The plan


@pytest.mark.parametrize("form", ["file", "record", "dictionary"])
def test_a_plan_applied_again_gives_the_same_weights(
    compressed: Result, model: Path, tmp_path: Path, form: str
) -> None:
    output, report = compressed
    plans = {"file": output / "surgery.json", "record": report.plan, "dictionary": report.plan.to_dict()}
    layer_surgery.compress(model, tmp_path / "again", plan=plans[form], eval_data=None)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    again, first = (read_report(path)["plan"] | {"parameter_bound": 0} for path in (tmp_path / "again", output))
    assert again == first


def test_a_plan_brings_its_method(model: Path, tmp_path: Path, compress: Compress, options: Options) -> None:
    compress("grasp", method="grasp", eval_data=None)
    data = {name: options[name] for name in ("calibration", "samples", "sequence_length")}
    layer_surgery.compress(model, tmp_path / "again", plan=tmp_path / "grasp" / "surgery.json", eval_data=None, **data)
    assert listing(tmp_path / "grasp")["model.safetensors"] == listing(tmp_path / "again")["model.safetensors"]


@pytest.mark.parametrize("changes", [{}, {"keep": 0}, {"refit_scope": "operated"}, {"refit": False}], ids=str)
def test_a_plan_brings_its_refit(model: Path, tmp_path: Path, options: Options, changes: Options) -> None:
    options = options | {"method": "fisher", "eval_data": None} | changes
    first = layer_surgery.compress(model, tmp_path / "first", **options)
    data = {name: options[name] for name in ("calibration", "samples", "sequence_length")}
    plan = tmp_path / "first" / "surgery.json"
    again = layer_surgery.compress(model, tmp_path / "again", plan=plan, eval_data=None, **data)
    scope = "none" if options.get("refit") is False else options.get("refit_scope", "all")
    assert first.plan.refit == again.plan.refit == scope
    assert again.refit == first.refit and bool(first.refit) is (scope != "none")
    assert listing(tmp_path / "first")["model.safetensors"] == listing(tmp_path / "again")["model.safetensors"]
    if scope != "none":
        plain = layer_surgery.compress(model, tmp_path / "plain", plan=plan, refit=False, eval_data=None, **data)
        assert plain.plan.refit == "none" and plain.refit == []
        assert listing(tmp_path / "plain")["model.safetensors"] != listing(tmp_path / "again")["model.safetensors"]


@pytest.fixture
def plan(compressed: Result, tmp_path: Path) -> tuple[Path, Options]:
    """Return a plan in a file of its own, and what is in it, for a test to edit."""
    data = read_report(compressed[0])["plan"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    return path, data


def test_an_edited_plan_is_applied(model: Path, tmp_path: Path, plan: tuple[Path, Options]) -> None:
    path, data = plan
    del data["target_layers"]
    data["layers"][0] = {"index": 0, "action": "low_rank", "ranks": {"mlp.up_proj": 5}}
    data["layers"][4] = {"index": 4, "action": "remove", "ranks": {}}
    path.write_text(json.dumps(data))
    report = layer_surgery.compress(model, tmp_path / "output", plan=path, method="svd", eval_data=None)
    assert report.plan.layers[0] == LayerPlan(index=0, action="low_rank", ranks={"mlp.up_proj": 5})
    loaded = layer_surgery.load(tmp_path / "output")
    assert loaded.config.num_hidden_layers == 4
    assert loaded.config.low_rank["model.layers.0.mlp.up_proj"] == 5
    assert "model.layers.0.mlp.down_proj" not in loaded.config.low_rank
    assert loaded.num_parameters() == report.plan.parameters


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path, plan: tuple[Path, Options]) -> None:
    other = saved_model(tmp_path / "other", layers=5, seed=1)
    with pytest.raises(PlanError, match=r"was made for another checkpoint .*base_sha256"):
        layer_surgery.compress(other, tmp_path / "output", plan=plan[0], eval_data=None)
    assert not (tmp_path / "output").exists()


def test_a_plan_for_any_checkpoint_is_applied(tmp_path: Path, plan: tuple[Path, Options]) -> None:
    other = saved_model(tmp_path / "other", layers=5, seed=1)
    edit_json(plan[0], base_sha256="")
    report = layer_surgery.compress(other, tmp_path / "output", plan=plan[0], eval_data=None)
    assert report.plan.base_sha256 == report.base_model["sha256"] != plan[1]["base_sha256"]


def test_a_plan_that_names_a_linear_it_does_not_have_is_refused(model: Path, plan: tuple[Path, Options]) -> None:
    path, data = plan
    data["layers"][0] = {"index": 0, "action": "low_rank", "ranks": {"mlp.nonsense": 5}}
    del data["target_layers"]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"layer 0 has no linear 'mlp\.nonsense'"):
        layer_surgery.compress(model, plan=path, no_save=True, eval_data=None)


def test_a_plan_with_low_rank_layers_and_method_remove_are_refused(model: Path, plan: tuple[Path, Options]) -> None:
    with pytest.raises(PlanError, match="--method remove"):
        layer_surgery.compress(model, plan=plan[0], method="remove", no_save=True, eval_data=None)


# Choices


@pytest.mark.parametrize("scorer", SCORERS.names)
def test_every_scorer_chooses_as_many_layers_as_asked(compress: Compress, scorer: str) -> None:
    report = compress(scorer=scorer, eval_data=None)
    assert report.plan.target_layers == 3
    assert report.scores is not None and report.scores.scorer == scorer
    assert {layer.index for layer in report.plan.operated} == set(report.scores.removal_order[:2])


def options_of(method: str) -> Options:
    """Return the method, and the layers of one that keeps nothing."""
    # The tiny model's matrices are too small for ranks and widths in steps of eight.
    more = {"keep": None, "layers": [2, 3]} if METHODS[method].removes else {"multiple": 2} if method == "mix" else {}
    return {"method": method, **more}


@pytest.mark.parametrize("method", [name for name in METHODS.names if name != "remove"])
def test_every_method_saves_a_model_that_loads(compress: Compress, tmp_path: Path, method: str) -> None:
    report = compress("output", **options_of(method))
    assert layer_surgery.load(tmp_path / "output").num_parameters() == report.plan.parameters
    assert report.plan.method == method


@pytest.mark.parametrize("removal", [{"keep": 0}, {"keep": None, "method": "remove"}], ids=str)
def test_layers_are_removed_outright(compress: Compress, tmp_path: Path, removal: Options) -> None:
    report = compress("output", **removal)
    assert [layer.action for layer in report.plan.operated] == ["remove", "remove"]
    assert json.loads((tmp_path / "output" / "config.json").read_text())["model_type"] == "llama"
    assert report.after.layers == 3


def test_the_layers_named_are_the_layers_operated_on(compress: Compress) -> None:
    assert [layer.index for layer in compress(target_layers=None, layers=[3, 0]).plan.low_rank] == [0, 3]


def test_a_fraction_of_the_whole_model_is_met(compress: Compress) -> None:
    report = compress("output", keep=None, target_parameters=0.8)
    assert report.plan.parameter_bound == int(0.8 * report.before.parameters)
    assert 0 <= report.plan.parameter_bound - report.after.parameters < 32 + 12


def test_everything_kept_is_the_original_model(model: Path, text: Path) -> None:
    """A full-rank truncated SVD with room to spare changes nothing but rounding."""
    plan = make_test_plan(5, low_rank={2: full_ranks(open_checkpoint(model), 2)})
    data = {"eval_data": text, "sequence_length": SEQUENCE}
    report = layer_surgery.compress(model, no_save=True, plan=plan, **data)
    (before,), (after,) = report.before.perplexity.values(), report.after.perplexity.values()
    assert after.value == pytest.approx(before.value, rel=1e-4)


# The refit


def test_the_default_method_refits_and_says_what_it_gained(model: Path, tmp_path: Path, options: Options) -> None:
    options = {name: value for name, value in options.items() if name != "method"}
    layer_surgery.compress(model, tmp_path / "output", **options)
    report = read_report(tmp_path / "output")
    assert report["plan"]["method"] == "mix" and report["plan"]["refit"] == "all"
    assert "refit" in report["timings"]
    first = min(layer["index"] for layer in report["plan"]["layers"] if layer["action"] in ("low_rank", "reduce"))
    assert report["expected"]["low"] <= report["expected"]["value"] <= report["expected"]["high"]
    assert {record["layer"] for record in report["refit"]} == set(range(first, 5))
    for record in report["refit"]:
        assert record.keys() == {"layer", "linear", "ridge", "error_before", "error_after"}
        assert record["error_after"] <= record["error_before"]
    assert any(record["error_after"] < record["error_before"] for record in report["refit"])


@pytest.mark.parametrize("method", [entry.name for entry in METHODS if not entry.refits])
def test_other_methods_refit_where_asked_to(compress: Compress, method: str) -> None:
    options = options_of(method) | {"eval_data": None}
    assert compress(**options).refit == []
    assert compress(**options, refit=True).refit


def test_whole_layers_stay_bit_for_bit_where_asked_to(model: Path, tmp_path: Path, compress: Compress) -> None:
    report = compress("output", method="fisher", eval_data=None, refit_scope="operated")
    original, operated = tensors_of(model), tensors_of(tmp_path / "output")
    low_rank = tuple(f"model.layers.{layer.index}." for layer in report.plan.low_rank)
    for name, tensor in original.items():
        if not name.startswith(low_rank):
            assert torch.equal(operated[name], tensor), name
    assert {record.layer for record in report.refit} == {layer.index for layer in report.plan.low_rank}


def test_general_text_is_looked_at_unless_it_is_there_or_not_wanted(compress: Compress, text: Path) -> None:
    def notes(**changes: Any) -> list[str]:
        found: list[str] = []
        fixed = {"method": "fisher", "eval_data": None, "samples": 8}
        compress(ui=layer_surgery.runs.session.Ui(note=found.append), **fixed | changes)
        return [note for note in found if note.startswith("refit")]

    (note,) = notes(samples=40)
    assert note.startswith("refit: on the calibration sequences and 10 of general text ('bundled'")
    # At least eight, so that one is held out; with fewer calibration sequences as many as there are of these.
    for samples, share, expected in ((40, 0.5, 20), (12, 0.25, 8), (6, 0.25, 6), (8, 1, 8)):
        (note,) = notes(samples=samples, refit_general=share)
        assert note.startswith(f"refit: on the calibration sequences and {expected} of general text")
    assert notes(refit_general=0) == []
    assert notes(calibration="bundled") == []
    assert notes(calibration=[f"{text}:3", "bundled:1"]) == []
    assert notes(refit=False) == []


def test_the_refit_takes_what_is_left_of_little_general_text(compress: Compress) -> None:
    """Long windows: the general text is packed as the calibration data is, and fewer windows are no error."""
    assert compress(method="fisher", eval_data=None, samples=8, sequence_length=64).refit


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"method": "remove", "refit": False}, "0"),
        ({"method": "remove", "refit": True}, "0.1"),
        ({"method": "fisher", "keep": 0, "refit": False}, "0"),
        ({"method": "fisher", "keep": 0}, "0.1"),
        ({"method": "fisher", "keep": 0.3, "refit": False}, "0.3"),
        ({"method": "fisher", "refit": False}, "0.1"),
        ({"method": "fisher", "target_parameters": 0.9, "refit": False}, "0.1"),
    ],
    ids=str,
)
def test_layers_are_ranked_at_what_is_kept_of_them(compress: Compress, changes: Options, kept: str) -> None:
    report = compress(**{"keep": None, "scorer": "fisher", "eval_data": None, "samples": 8} | changes)
    assert report.scores is not None and f"with a fraction {kept} kept" in report.scores.quantity


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_numbers_do_for_everything(compress: Compress, tmp_path: Path, dtype: str) -> None:
    report = compress("output", method="fisher", dtype=dtype)
    assert report.refit and layer_surgery.load(tmp_path / "output").num_parameters() == report.plan.parameters


def test_a_mixture_with_mostly_masked_examples_does_for_everything(
    compress: Compress, tmp_path: Path, text: Path
) -> None:
    examples = tmp_path / "task.jsonl"
    lines = [{"prompt": f"the quick brown fox number {k}?", "answer": "one"} for k in range(40)]
    examples.write_text("\n".join(json.dumps(line) for line in lines))
    options = {"method": "fisher", "scorer": "fisher", "samples": 9, "batch_size": 4, "sequence_length": 32}
    for data in (examples, [f"{examples}:2", f"{text}:1"]):
        report = compress(calibration=data, **options)
        assert report.refit and report.plan.predicted_loss_rise is not None


# The same again


@pytest.mark.parametrize("method", ["svd", "grasp", "fisher", "replaceme", "laco"])
def test_the_same_inputs_and_seed_give_the_same_files(compress: Compress, tmp_path: Path, method: str) -> None:
    reports = [compress(name, **options_of(method), seed=3) for name in ("first", "second")]
    assert reports[0].plan == reports[1].plan
    assert reports[0].scores == reports[1].scores
    assert reports[0].after == reports[1].after
    timed = {"surgery.json", *PAGE_FILES}
    first, second = (listing(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys() > timed
    assert {name for name in first if first[name] != second[name]} <= timed


def test_another_seed_takes_other_windows(compress: Compress) -> None:
    reports = [compress(seed=seed) for seed in (0, 0, 1)]
    hashes = [report.calibration["sha256"] for report in reports if report.calibration]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_state_of_torchs_generator_does_not_matter_and_is_not_touched(compress: Compress) -> None:
    reports = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        reports.append(compress(scorer="random"))
        assert torch.equal(torch.get_rng_state(), before)
    assert reports[0].plan == reports[1].plan


@pytest.mark.parametrize("method", ["grasp", "fisher"])
def test_batch_size_does_not_change_the_choice(compress: Compress, method: str) -> None:
    reports = [compress(method=method, batch_size=size) for size in (1, 4)]
    assert reports[0].plan == reports[1].plan
    values = [[p.value for p in report.after.perplexity.values()] for report in reports]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# A dry run


def test_a_dry_run_writes_nothing(
    model: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = listing(tmp_path), listing(model)
    layer_surgery.compress(model, no_save=True, **options | {"method": "grasp"})
    layer_surgery.compress(model, tmp_path / "some" / "output", no_save=True, **options)
    assert (listing(tmp_path), listing(model)) == before


@pytest.mark.parametrize("method", ["svd", "grasp"])
def test_a_dry_run_reports_what_the_real_run_reports(compress: Compress, method: str) -> None:
    dry, real = compress(method=method), compress("output", method=method)
    assert dry.output is None
    for part in ("plan", "scores", "before", "after", "calibration", "base_model"):
        assert getattr(dry, part) == getattr(real, part), part


def test_a_dry_run_refuses_what_the_real_run_would(model: Path, tmp_path: Path, options: Options) -> None:
    (tmp_path / "output").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        layer_surgery.compress(model, tmp_path / "output", no_save=True, **options)


# From memory


def test_a_model_in_memory_needs_its_tokenizer_only_for_text(options: Options, tmp_path: Path) -> None:
    model = model_with_vocabulary()
    layer_surgery.compress(model, tmp_path / "output", layers=[1], keep=0.3, method="svd", eval_data=None)
    with pytest.raises(DataError, match="needs its tokenizer"):
        layer_surgery.compress(model, tmp_path / "other", **options)
    assert layer_surgery.score(model, scorer="random").removal_order
    options = {name: options[name] for name in ("calibration", "samples", "sequence_length")}
    assert layer_surgery.score(model, tokenizer=tiny_tokenizer(), **options).tokens == 6 * SEQUENCE


def test_two_operations_one_after_the_other(compressed: Result, tmp_path: Path, options: Options) -> None:
    """What was compressed can be compressed again: a whole layer becomes low-rank, a low-rank one goes."""
    output, report = compressed
    whole = [layer.index for layer in report.plan.layers if layer.action == "keep"]
    gone = report.plan.low_rank[0].index
    more = options | {"target_layers": None, "layers": [whole[0]]}
    second = layer_surgery.compress(output, tmp_path / "second", **more)
    assert layer_surgery.load(tmp_path / "second").num_parameters() == second.plan.parameters
    third = layer_surgery.compress(tmp_path / "second", tmp_path / "third", **more | {"layers": [gone], "keep": 0})
    loaded = layer_surgery.load(tmp_path / "third")
    assert loaded.num_parameters() == third.plan.parameters
    assert loaded.config.num_hidden_layers == 4


def test_a_model_whose_last_low_rank_layer_goes_is_an_ordinary_one_again(model: Path, tmp_path: Path) -> None:
    layer_surgery.compress(model, tmp_path / "low rank", layers=[1], keep=0.3, method="svd", eval_data=None)
    removal: Options = {"layers": [1], "keep": 0, "refit": False, "eval_data": None}
    layer_surgery.compress(tmp_path / "low rank", tmp_path / "plain", **removal)
    layer_surgery.compress(model, tmp_path / "directly", **removal)
    assert not list((tmp_path / "plain").glob("*.py"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "directly")]
    assert configs[0] | {"transformers_version": ""} == configs[1] | {"transformers_version": ""}
    assert tensors_of(tmp_path / "plain").keys() == tensors_of(tmp_path / "directly").keys()


# What a review of 0.1.0 found


def test_a_single_evaluation_text_needs_no_list(model: Path, text: Path) -> None:
    result = layer_surgery.evaluate(model, eval_data=str(text), sequence_length=SEQUENCE).model
    assert list(result.perplexity) == [str(text)]


def test_devices_and_dtypes_may_be_torchs_own(model: Path, text: Path) -> None:
    options: Options = {"eval_data": text, "sequence_length": SEQUENCE}
    ours = layer_surgery.evaluate(model, device=torch.device("cpu"), dtype=torch.float32, **options).model
    assert ours == layer_surgery.evaluate(model, device="cpu", dtype="float32", **options).model


def test_a_column_applies_to_tables_and_not_to_plain_text(compress: Compress, text: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"body": text.read_text()}) + "\n")
    report = compress(text_column="body", calibration=table, method="grasp")
    assert report.calibration is not None
    assert report.calibration["name"] == str(table)
    with pytest.raises(DataError, match="--text-column body applies to none of"):
        compress(text_column="body", method="grasp")


def test_a_scorer_is_not_asked_to_choose_among_low_rank_layers(compressed: Result, options: Options) -> None:
    with pytest.raises(PlanError, match=r"has low-rank layers already.*--layers.*--keep 0"):
        layer_surgery.compress(compressed[0], no_save=True, **options)


def test_a_budget_that_one_of_the_layers_cannot_keep_is_refused_before_the_scorer_chooses(
    model: Path, options: Options, tmp_path: Path
) -> None:
    """The first layers can be cut to a tenth; the last, which has fewer channels already, cannot."""
    searching = options | {"method": "mix", "refit": False, "eval_data": None}
    narrowed = searching | {"target_layers": None, "layers": [4], "keep": 0.6, "components": "channels"}
    layer_surgery.compress(model, tmp_path / "narrowed", **narrowed)
    with pytest.raises(PlanError, match=r"if --scorer fisher chooses layer 4, .* reachable: --keep 0\.1"):
        layer_surgery.compress(tmp_path / "narrowed", no_save=True, **searching | {"keep": 0.1})


def test_unknown_fields_of_a_plan_are_refused(model: Path, plan: tuple[Path, Options]) -> None:
    path, data = plan
    data["layers"][0] = {"index": 0, "action": "keep", "rank": 3}
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="unknown field 'rank'"):
        layer_surgery.compress(model, plan=path, no_save=True, eval_data=None)


@pytest.mark.parametrize("place", [".", ".."])
def test_the_current_directory_is_never_replaced(
    model: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(OutputError, match="is the current directory or above it"):
        layer_surgery.compress(model, place, overwrite=True, **options)


def test_the_rank_table_shows_every_linear_of_an_uneven_plan() -> None:
    from rich.console import Console

    from layer_surgery.records import SurgeryPlan
    from layer_surgery.reporting.console import print_ranks

    layers = [
        LayerPlan(index=0, action="low_rank", ranks={"self_attn.q_proj": 11}),
        LayerPlan(index=1, action="low_rank", ranks={"mlp.down_proj": 22}),
    ]
    console = Console(record=True, width=100, file=io.StringIO())
    print_ranks(console, SurgeryPlan(method="svd", target_layers=0, layers=layers))
    text = console.export_text()
    assert all(part in text for part in ("q_proj", "down_proj", "11", "22"))
