"""Evaluation as a whole: two models side by side, what is switched off, what fails alone, and what is refused."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import HUB_TASK, CommandLine, model_with_vocabulary, saved_model, strict_json
from tiny_families import DECODERS, SIX_LAYERS
from tiny_models import streamed
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import layer_surgery
from layer_surgery import EvaluationReport
from layer_surgery.cli.main import cli
from layer_surgery.errors import CheckpointError, DataError, LayerSurgeryError, NumericalError
from layer_surgery.walk.streamed import StreamedModel

SEQUENCE = 16


@pytest.fixture(scope="module")
def operated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("operated") / "output"
    layer_surgery.compress(model, output, layers=[1, 2], keep=0.3, method="svd", eval_data=None)
    return output


@pytest.fixture(scope="module")
def everything(text: Path) -> dict[str, Any]:
    speed = {"speed": True, "speed_lengths": [8], "speed_new_tokens": 3, "speed_repeats": 2}
    tasks = {"tasks": "bundled_agreement", "limit": 6}
    return {"eval_data": [text], "sequence_length": SEQUENCE, "continuations": 2} | tasks | speed


@pytest.fixture(scope="module")
def report(model: Path, operated: Path, everything: dict[str, Any]) -> EvaluationReport:
    return layer_surgery.evaluate(operated, baseline=model, **everything)


def test_a_report_has_everything_of_both_models(report: EvaluationReport, text: Path) -> None:
    assert report.failures == []
    assert report.baseline is not None and report.comparison is not None
    for result in (report.baseline, report.model):
        assert result.perplexity[str(text)].value > 1
        assert result.tasks["bundled_agreement"].items == 6
        assert [(point.batch_size, point.prompt_tokens) for point in result.speed] == [(1, 8)]
        assert result.speed[0].decode_tokens_per_second > 0 < result.speed[0].peak_memory_bytes
        assert result.kv_cache_bytes_per_token == 4 * 2 * 2 * 12 * 4
        assert result.flops_context_tokens == SEQUENCE
    assert report.model.parameters < report.baseline.parameters
    assert report.model.flops_per_token < report.baseline.flops_per_token
    assert len(report.continuations) == 2


def test_the_comparison_agrees_with_what_was_measured_of_each(report: EvaluationReport, text: Path) -> None:
    assert report.baseline is not None and report.comparison is not None
    before, after = (result.perplexity[str(text)] for result in (report.baseline, report.model))
    change = report.comparison.perplexity[str(text)]
    assert change.ratio.value == pytest.approx(after.value / before.value, rel=1e-9)
    assert change.loss_difference.value == pytest.approx(math.log(after.value / before.value), rel=1e-6)
    assert change.ratio.low < change.ratio.value < change.ratio.high
    assert change.ratio.pairs == before.windows
    divergence, agreement = report.comparison.kl_divergence[str(text)], report.comparison.top1_agreement[str(text)]
    assert 0 < divergence.mean < divergence.p99_9 <= divergence.maximum
    assert divergence.tokens == agreement.tokens == before.tokens
    assert 0 < agreement.value < 1
    accuracy = [result.tasks["bundled_agreement"].metrics["acc"].value for result in (report.baseline, report.model)]
    assert report.comparison.tasks["bundled_agreement"]["acc"].value == pytest.approx(accuracy[1] - accuracy[0])


def test_the_distance_is_from_the_baseline_to_the_model(model: Path, operated: Path, text: Path) -> None:
    report = layer_surgery.evaluate(
        operated, baseline=model, eval_data=text, sequence_length=SEQUENCE, eval_windows=4, continuations=0
    )
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: 4 * SEQUENCE].view(4, SEQUENCE)
    with torch.no_grad():
        p, q = (layer_surgery.load(path)(windows).logits[:, :-1].double().log_softmax(-1) for path in (model, operated))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert float((q.exp() * (q - p)).sum(-1).mean()) != pytest.approx(expected, rel=1e-3)
    assert report.comparison is not None
    assert report.comparison.kl_divergence[str(text)].mean == pytest.approx(expected, rel=1e-5)


def test_continuations_are_those_of_each_model(report: EvaluationReport, model: Path, operated: Path) -> None:
    for continuation in report.continuations:
        ids = torch.tensor([tiny_tokenizer()(continuation.prompt)["input_ids"]])
        for path, written in ((model, continuation.before), (operated, continuation.after)):
            output = layer_surgery.load(path).generate(ids, do_sample=False, max_new_tokens=32, pad_token_id=0)
            assert written == tiny_tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_model_against_itself_is_at_distance_zero(model: Path, text: Path) -> None:
    report = layer_surgery.evaluate(model, baseline=model, eval_data=text, sequence_length=SEQUENCE)
    assert report.comparison is not None
    name = str(text)
    assert report.comparison.kl_divergence[name].maximum == 0
    assert report.comparison.top1_agreement[name].value == 1
    ratio = report.comparison.perplexity[name].ratio
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert all(continuation.before == continuation.after for continuation in report.continuations)


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_architecture_can_be_evaluated(
    model_type: str, everything: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    layers = 6 if model_type in SIX_LAYERS else 4
    path = saved_model(tmp_path / "model", model=model_with_vocabulary(model_type, layers=layers))
    options: dict[str, Any] = {"eval_data": text, "eval_windows": 2, "limit": 2, "continuations": 1}
    options |= {"speed_lengths": [4], "speed_new_tokens": 2, "speed_repeats": 1}
    report = layer_surgery.evaluate(path, baseline=path, **everything | options)
    assert report.failures == []
    assert report.comparison is not None
    assert report.comparison.kl_divergence[str(text)].maximum == 0
    assert report.comparison.top1_agreement[str(text)].value == 1
    assert report.model.tasks and report.model.speed and report.continuations
    ids = torch.arange(3, 14)[None]
    loaded = AutoModelForCausalLM.from_pretrained(path)
    whole = streamed(path, dtype=torch.float32).load_whole()
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-5)


def test_compress_and_evaluate_measure_the_same(
    model: Path, everything: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    options = {name: value for name, value in everything.items() if not name.startswith("speed")}
    output = tmp_path / "output"
    made = layer_surgery.compress(model, output, layers=[1, 2], keep=0.3, method="svd", **options)
    again = layer_surgery.evaluate(output, baseline=model, **options)
    assert made.before == again.baseline
    assert made.after == again.model
    assert made.comparison == again.comparison
    assert made.continuations == again.continuations
    saved = strict_json((output / "surgery.json").read_text(encoding="utf-8"))
    assert saved["comparison"]["kl_divergence"][str(text)]["mean"] == made.comparison.kl_divergence[str(text)].mean
    assert saved["failures"] == []


def test_only_speed_has_both_models_in_memory(
    model: Path, operated: Path, everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = {True: 0, False: 0}
    load = StreamedModel.load_whole
    speed = False

    def spy(self: StreamedModel) -> Any:
        gc.collect()
        model = load(self)
        alive.append(weakref.ref(model))
        most[speed] = max(most[speed], sum(reference() is not None for reference in alive))
        return model

    monkeypatch.setattr(StreamedModel, "load_whole", spy)
    without = {name: value for name, value in everything.items() if not name.startswith("speed")}
    layer_surgery.evaluate(operated, baseline=model, **without)
    assert most[False] == 1
    speed = True
    layer_surgery.evaluate(operated, baseline=model, **everything)
    assert most[True] == 2


# Switches


def empty(report: dict[str, Any], names: tuple[str, ...]) -> set[str]:
    """Return which of the measurements a report has nothing of."""
    found = report | report["comparison"] | report["model"]
    return {name for name in names if not found[name]}


def test_without_a_baseline_there_is_nothing_to_compare(operated: Path, everything: dict[str, Any]) -> None:
    report = layer_surgery.evaluate(operated, **everything)
    assert report.baseline is None and report.comparison is None
    assert len(report.model.perplexity) == len(report.model.tasks) == len(report.model.speed) == 1
    assert [continuation.before for continuation in report.continuations] == [None, None]
    assert all(continuation.after for continuation in report.continuations)


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        ({"distance": False}, {"kl_divergence", "top1_agreement"}),
        ({"tasks": []}, {"tasks"}),
        ({"speed": False}, {"speed"}),
        ({"continuations": 0}, {"continuations"}),
        ({"eval_data": None}, {"perplexity", "kl_divergence", "top1_agreement", "continuations"}),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_every_stage_can_be_switched_off(
    model: Path, operated: Path, everything: dict[str, Any], off: dict[str, Any], gone: set[str]
) -> None:
    options = everything | off
    if options["tasks"] == []:
        del options["limit"]
    if not options["speed"]:
        options = {name: value for name, value in options.items() if not name.startswith("speed")}
    report = layer_surgery.evaluate(operated, baseline=model, **options)
    data = report.to_dict()
    assert empty(data, ("perplexity", "tasks", "speed", "kl_divergence", "top1_agreement", "continuations")) == gone


def test_a_model_that_does_not_fit_by_default_continues_only_when_asked(model: Path, text: Path) -> None:
    options: dict[str, Any] = {"eval_data": text, "sequence_length": SEQUENCE, "resident_bytes": 1000}
    assert layer_surgery.evaluate(model, **options).continuations == []
    assert len(layer_surgery.evaluate(model, continuations=1, **options).continuations) == 1
    assert len(layer_surgery.evaluate(model, **options | {"resident_bytes": None}).continuations) == 3


def test_own_prompts_need_no_text(model: Path) -> None:
    report = layer_surgery.evaluate(model, eval_data=None, prompts=["the quick brown", "one two"])
    assert [continuation.prompt for continuation in report.continuations] == ["the quick brown", "one two"]


# Failures


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("it broke\nfor a reason")


@pytest.mark.parametrize(
    ("target", "stages", "lost"),
    [
        ("runs.evaluator.measure_distance", ["distance on"], "kl_divergence"),
        ("evaluation.tasks.simple_evaluate", ["tasks before", "tasks after"], "tasks"),
        ("runs.evaluator.measure_speed", ["speed"], "speed"),
        ("runs.evaluator.continuations", ["continuations before", "continuations after"], "continuations"),
    ],
)
def test_a_stage_that_fails_loses_nothing_else(
    model: Path,
    operated: Path,
    everything: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    stages: list[str],
    lost: str,
) -> None:
    import layer_surgery.evaluation.tasks  # before it is patched

    monkeypatch.setattr(f"layer_surgery.{target}", failing)
    report = layer_surgery.evaluate(operated, baseline=model, **everything).to_dict()
    assert [failure["error"] for failure in report["failures"]] == ["RuntimeError: it broke for a reason"] * len(stages)
    assert all(f["stage"].startswith(stage) for f, stage in zip(report["failures"], stages, strict=True))
    assert empty(report, ("perplexity", "tasks", "speed", "kl_divergence", "continuations")) == {lost}
    assert bool(report["comparison"]["tasks"]) is (lost != "tasks")


def test_a_failed_stage_is_printed_and_the_command_fails_after_printing_the_rest(
    run: CommandLine, model: Path, operated: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_surgery.runs.evaluator.measure_distance", failing)
    arguments = ["evaluate", operated, "--baseline", model, "--eval-data", text, "--sequence-length", SEQUENCE]
    outcome = run(*arguments)
    assert outcome.code == 1
    assert "perplexity" in outcome.out and "x " in outcome.out
    assert outcome.error_lines[-1].startswith(f"error: distance on '{text}' failed: RuntimeError: it broke for a")
    as_json = run(*arguments, "--json")
    assert as_json.code == 1
    assert len(strict_json(as_json.out)["failures"]) == 1
    assert "Traceback" not in outcome.err + as_json.err


def test_what_compress_has_made_is_saved_though_its_evaluation_fails(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layer_surgery.runs import evaluator

    calls: list[str] = []
    window_losses = evaluator.window_losses

    def second_fails(*arguments: Any) -> Any:
        calls.append("")
        if len(calls) > 1:
            raise NumericalError("the loss is not finite.")
        return window_losses(*arguments)

    monkeypatch.setattr(evaluator, "window_losses", second_fails)
    output = tmp_path / "output"
    arguments = ["compress", model, "--layers", 1, "--keep", 0, "--eval-data", text, "--sequence-length", SEQUENCE]
    outcome = run(*arguments, "--output", output)
    assert outcome.code == 1
    assert outcome.error_lines[-1] == "error: perplexity after failed: the loss is not finite."
    assert AutoModelForCausalLM.from_pretrained(output).config.num_hidden_layers == 3
    saved = json.loads((output / "surgery.json").read_text(encoding="utf-8"))
    assert saved["failures"] == [{"stage": "perplexity after", "error": "the loss is not finite."}]
    assert saved["before"]["perplexity"] and not saved["after"]["perplexity"]
    assert "perplexity" in outcome.out


def test_the_first_measurement_that_fails_ends_the_run(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_surgery.runs.evaluator.window_losses", failing)
    with pytest.raises(RuntimeError, match="it broke"):
        layer_surgery.evaluate(model, eval_data=text, sequence_length=SEQUENCE)


def test_an_interrupt_is_no_failed_stage(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("layer_surgery.runs.evaluator.continuations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer_surgery.evaluate(model, eval_data=text, sequence_length=SEQUENCE)


# Bad input: refused before any model is run


@pytest.fixture
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was run")

    monkeypatch.setattr("layer_surgery.runs.evaluator.window_losses", never)
    monkeypatch.setattr(StreamedModel, "load_whole", never)


@pytest.mark.parametrize("distance", [True, False])
def test_a_baseline_with_another_vocabulary_is_compared_without_distance_only(
    model: Path, text: Path, tmp_path: Path, request: pytest.FixtureRequest, distance: bool
) -> None:
    other = saved_model(tmp_path / "other", model=model_with_vocabulary(vocab_size=330))
    options: dict[str, Any] = {"eval_data": text, "sequence_length": SEQUENCE, "distance": distance}
    if distance:
        request.getfixturevalue("nothing_is_run")
        with pytest.raises(CheckpointError, match=r"vocabulary of 320 tokens and .* 330.*--no-distance"):
            layer_surgery.evaluate(model, baseline=other, **options)
    else:
        report = layer_surgery.evaluate(model, baseline=other, continuations=0, **options)
        assert report.comparison is not None
        assert report.comparison.perplexity and not report.comparison.kl_divergence


@pytest.mark.usefixtures("nothing_is_run")
def test_a_baseline_that_reads_text_as_other_tokens_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    other = saved_model(tmp_path / "other")
    tiny_tokenizer(adds_bos=True).save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"tokenise .* differently.*cannot be compared"):
        layer_surgery.evaluate(model, baseline=other, eval_data=text, sequence_length=SEQUENCE)


@pytest.mark.usefixtures("nothing_is_run")
def test_a_task_that_cannot_be_had_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text(HUB_TASK, encoding="utf-8")
    data: dict[str, Any] = {"eval_data": text, "sequence_length": SEQUENCE, "tasks": "from_hub", "task_path": tmp_path}
    with pytest.raises(DataError, match="nor can they be had from the hub"):
        layer_surgery.compress(model, tmp_path / "output", target_layers=3, **data)
    assert not (tmp_path / "output").exists()


@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize("option", ["tasks", "speed", "prompts"])
def test_a_model_that_does_not_fit_in_memory_is_refused_where_it_must(
    model: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_surgery.runs.evaluator.available_memory_bytes", lambda _device: 1000)
    options: dict[str, Any] = {
        "tasks": {"tasks": "bundled"},
        "speed": {"speed": True, "speed_lengths": [8], "speed_new_tokens": 2},
        "prompts": {"prompts": "the"},
    }[option]
    with pytest.raises(CheckpointError, match=r"need whole models in memory, here [\d,]+ bytes, but 1,000"):
        layer_surgery.evaluate(model, eval_data=None, **options)


def test_speed_of_two_models_needs_memory_for_two(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * layer_surgery.load(model).num_parameters()
    monkeypatch.setattr("layer_surgery.runs.evaluator.available_memory_bytes", lambda _device: round(1.5 * size))
    options: dict[str, Any] = {"eval_data": None, "speed": True, "speed_lengths": [8], "speed_new_tokens": 2}
    assert layer_surgery.evaluate(model, **options).model.speed
    with pytest.raises(CheckpointError, match="need whole models in memory"):
        layer_surgery.evaluate(model, baseline=model, **options)


@pytest.mark.usefixtures("nothing_is_run")
def test_more_tokens_than_the_model_takes_are_refused(model: Path) -> None:
    with pytest.raises(DataError, match=r"make 92 tokens, but .* takes at most 64"):
        layer_surgery.evaluate(model, eval_data=None, speed=True, speed_lengths=[8, 60])


# The command line


def test_evaluate_on_the_command_line(run: CommandLine, model: Path, operated: Path, text: Path) -> None:
    arguments: list[Any] = ["evaluate", operated, "--baseline", model, "--eval-data", text, "--sequence-length", 16]
    arguments += ["--tasks", "bundled_cloze,bundled_agreement", "--tasks", "bundled_copying", "--limit", 3, "--speed"]
    arguments += ["--speed-batch-sizes", "1,2", "--speed-lengths", "4,8", "--speed-new-tokens", 2]
    arguments += ["--speed-repeats", 1, "--prompt", "the fox", "--prompt", "one"]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    for word in ("perplexity", "KL", "top-1", "bundled_cloze", "bundled_copying", "prefill", "prompt 2", "FLOPs"):
        assert word in outcome.out
    data = strict_json(run(*arguments, "--json").out)
    assert data.keys() >= {"model", "baseline", "comparison", "continuations", "failures", "timings", "provenance"}
    assert len(data["model"]["speed"]) == 4
    assert set(data["model"]["tasks"]) == {"bundled_cloze", "bundled_agreement", "bundled_copying"}
    assert data["model"]["speed"][0]["prefill_tokens_per_second"] > 0
    provenance = data["provenance"]
    assert provenance["command"].startswith("layer-surgery evaluate")
    assert provenance["config"]["limit"] == 3
    assert provenance["packages"]["lm-eval"]


def test_no_eval_measures_size_only(run: CommandLine, model: Path) -> None:
    data = strict_json(run("evaluate", model, "--no-eval", "--json").out)
    assert data["model"]["perplexity"] == data["model"]["tasks"] == {}
    assert data["continuations"] == []
    assert data["model"]["parameters"] > 0


def test_score_says_where_its_numbers_come_from(run: CommandLine, model: Path, text: Path) -> None:
    outcome = run("score", model, "--calibration", text, "--samples", 4, "--sequence-length", 16, "--json")
    provenance = strict_json(outcome.out)["provenance"]
    assert provenance["command"].startswith("layer-surgery score")
    assert provenance["config"]["samples"] == 4
    assert {"time", "packages", "seed", "compute_dtype", "device"} <= provenance.keys()


def test_debug_shows_where_a_stage_failed(
    run: CommandLine, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("layer_surgery.runs.evaluator.continuations", failing)
    arguments = ["evaluate", str(model), "--eval-data", str(text), "--sequence-length", "16", "--debug"]
    with caplog.at_level("DEBUG", logger="layer_surgery"), pytest.raises(LayerSurgeryError):
        cli.main(arguments, standalone_mode=False)
    assert any(record.exc_info and "it broke" in str(record.exc_info[1]) for record in caplog.records)
