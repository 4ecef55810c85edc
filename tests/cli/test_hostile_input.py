"""Files and names that somebody has made to do harm, or that are broken in a way nobody thinks of.

Each ends with one sentence and exit code 2 before any work is done; nothing hangs, runs, or is obeyed by a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, Outcome, edit_json, edit_tensors, listing, model_with_vocabulary, saved_model

import layer_surgery
from layer_surgery.data import rendering
from layer_surgery.errors import CheckpointError

DEEP = "[" * 900 + "]" * 900
VERY_DEEP = "[" * 200_000
LONG = "x" * 5000


def refused(outcome: Outcome, *expected: str, code: int = 2) -> None:
    """Check that a command ended with one sentence that holds all that is expected."""
    assert outcome.code == code, (outcome.code, outcome.err, outcome.out)
    message = outcome.error_lines[-1]
    assert message.startswith("error: ") and "Traceback" not in outcome.err, outcome.err
    for part in expected:
        assert part in message, f"{part!r} is not in {message!r}"


def score(run: CommandLine, path: object, text: Path, *options: object) -> Outcome:
    """Rank the layers of a model on a little text."""
    return run("score", path, "--calibration", text, "--samples", 4, "--sequence-length", 16, *options)  # type: ignore[arg-type]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A model to damage."""
    return shutil.copytree(model, tmp_path / "model")


# Configurations


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers asks the hub's kernels for, which are taken to be installed."""
    asked: list[str] = []

    def get_kernel(name: str, *_: object, **__: object) -> types.ModuleType:
        asked.append(name)
        raise RuntimeError("fetched")

    hub_kernels = sys.modules["transformers.integrations.hub_kernels"]
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    return asked


FETCHING: dict[str, dict[str, Any]] = {
    "attention": {"attn_implementation": "owner/kernel"},
    "attention, private": {"_attn_implementation": "owner/kernel"},
    "attention, revision": {"attn_implementation": "owner/kernel@main:function"},
    "attention, paged": {"attn_implementation": "paged|owner/kernel"},
    "attention, by part": {"attn_implementation": {"": "owner/kernel"}},
    "attention, fetched if not installed": {"attn_implementation": "flash_attention_2"},
    "attention, nested": {"rope_scaling": {"attn_implementation": "owner/kernel"}},
    "attention, no text": {"attn_implementation": ["owner/kernel"]},
    "experts": {"experts_implementation": "sonicmoe"},
    "experts, private": {"_experts_implementation": "owner/kernel"},
    "other weights": {"transformers_weights": "other.bin"},
}


@pytest.mark.parametrize("name", FETCHING)
def test_a_configuration_that_fetches_or_runs_something_is_refused(
    run: CommandLine, copy: Path, text: Path, fetched: list[str], name: str
) -> None:
    edit_json(copy / "config.json", **FETCHING[name])
    refused(score(run, copy, text), "config.json", "emove the field")
    with pytest.raises(CheckpointError):
        layer_surgery.load(copy)
    assert fetched == []


def test_an_adapter_beside_the_weights_is_not_put_into_the_model(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other", "peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="has a PEFT adapter beside its weights"):
        layer_surgery.load(copy)


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_only_regular_templates_are_copied(copy: Path, tmp_path: Path, kind: str) -> None:
    folder = copy / "additional_chat_templates"
    folder.mkdir()
    (folder / "tools.jinja").write_text("{{ messages }}")
    for name in ("other.jinja", "other.txt"):
        if kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero")
    output = tmp_path / "output"
    layer_surgery.compress(copy, output, layers=[1], keep=0, refit=False, eval_data=None)
    assert [path.name for path in (output / folder.name).iterdir()] == ["tools.jinja"]


def test_who_trusts_a_checkpoint_gets_its_kernel(run: CommandLine, copy: Path, text: Path, fetched: list[str]) -> None:
    edit_json(copy / "config.json", attn_implementation="owner/kernel")
    refused(score(run, copy, text, "--trust-remote-code"), "cannot be built")
    assert fetched == ["owner/kernel"]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_what_transformers_has_itself_is_not_refused(run: CommandLine, copy: Path, text: Path, name: str) -> None:
    edit_json(copy / "config.json", attn_implementation=name)
    assert score(run, copy, text).code == 0


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "architectures of null": ({"architectures": [None]}, "architectures is [None]; it must be a list of names"),
    "architectures a number": ({"architectures": 5}, "architectures is 5; it must be a list of names"),
    "infinite eps": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a finite number"),
    "infinite eps, as transformers writes it": (
        {"rms_norm_eps": {"__float__": "Infinity"}},
        "rms_norm_eps is inf; it must be a finite number",
    ),
    "a million layers": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers: 1000000, but the checkpoint's 39"),
    "a thousand layers": ({"num_hidden_layers": 1_000}, "num_hidden_layers: 1000, but the checkpoint's 39"),
    "many labels": ({"num_labels": 1e9}, "num_labels: 1000000000, but the checkpoint's 39 tensors are not enough"),
    "many nested": ({"nested": [{"num_experts": 10**12}]}, "num_experts: 1000000000000"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_the_tensors_do_not_bear_out_is_refused(
    run: CommandLine, copy: Path, text: Path, name: str
) -> None:
    fields, expected = CONFIGURATIONS[name]
    edit_json(copy / "config.json", **fields)
    refused(score(run, copy, text), "config.json", expected)


@pytest.mark.parametrize("depth", [DEEP, VERY_DEEP], ids=["deep", "very deep"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_json_that_is_nested_deeply_is_refused(run: CommandLine, copy: Path, text: Path, file: str, depth: str) -> None:
    if file.endswith("index.json"):
        (copy / "model.safetensors").unlink()
        (copy / file).write_text(f'{{"weight_map": {depth}}}')
    else:
        fields = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(fields)[:-1] + f', "deep": {depth}}}')
    refused(score(run, copy, text))


def test_deep_json_is_refused_in_plans_data_and_reports(run: CommandLine, model: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    for content in (DEEP, VERY_DEEP, f'{{"schema_version": 1, "plan": {DEEP}}}'):
        deep.write_text(content)
        refused(run("compress", model, "--plan", deep, "--dry-run", "--no-eval"), "deep.json", "not JSON")
        refused(run("report", deep, "--output", tmp_path / "page.html"), "deep.json", "not JSON")
        refused(run("score", model, "--calibration", deep), "deep.json", "JSON")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"text": "one"}}\n{{"text": {DEEP}}}\n')
    refused(run("score", model, "--calibration", rows), "rows.jsonl, line 2")


@pytest.mark.parametrize("value", ["x", None, [1], True])
def test_a_longest_length_that_is_no_number_is_refused(run: CommandLine, copy: Path, text: Path, value: Any) -> None:
    fields = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**fields, "model_max_length": value}))
    outcome = score(run, copy, text)
    if value is None:  # transformers has its own default
        assert outcome.code == 0
    else:
        refused(outcome, "model_max_length")


@pytest.mark.parametrize(
    "template",
    ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}", "{{ 2.0 ** 100000 }}", "{{ messages.x.y }}"],
)
def test_a_chat_template_that_fails_is_refused(run: CommandLine, copy: Path, tmp_path: Path, template: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]})
    )
    refused(score(run, copy, chats), "chats.jsonl, chat 1: the chat template does not accept the messages")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% if messages | length > 1 %}{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}{% endif %}",
    ],
)
def test_a_chat_template_that_does_not_end_is_stopped(
    run: CommandLine, copy: Path, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1)
    monkeypatch.setattr(rendering, "MEMORY", 1 << 28)
    (copy / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]})
    )
    refused(score(run, copy, chats), "chats.jsonl, chat 1: the chat template does not accept the messages")


# Names and files


def test_names_that_no_file_system_has_are_refused(run: CommandLine, model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", text, "--samples", 4, "--sequence-length", 16]
    compress = ["compress", model, "--layers", 1, *options, "--no-eval", "--keep", 0, "--no-refit"]
    for command in (
        ["score", f"./{LONG}", *options],
        [*compress, "--output", tmp_path / LONG],
        [*compress, "--output", tmp_path / LONG / "output"],
        ["score", model, *options, "--cache", tmp_path / LONG],
        ["score", model, "--calibration", f"./{LONG}.txt"],
        ["compress", model, "--plan", tmp_path / LONG, "--dry-run"],
        ["report", tmp_path / LONG],
        ["evaluate", model, "--no-eval", "--tasks", f"{LONG}.yaml"],
        ["evaluate", model, "--no-eval", "--tasks", "bundled", "--task-path", tmp_path / LONG],
    ):
        refused(run(*command))  # type: ignore[arg-type]
    assert listing(tmp_path) == {}


def test_the_home_of_nobody_is_refused(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compress = ["compress", model, "--layers", 1, "--keep", 0, "--no-refit", "--no-eval"]
    for command in (
        [*compress, "--output", "~nobody-of-this-name/x"],
        ["score", "~nobody-of-this-name/x"],
        ["score", model, "--cache", "~nobody-of-this-name"],
        ["score", model, "--calibration", "~nobody-of-this-name/x.txt"],
        ["report", "~nobody-of-this-name"],
    ):
        refused(run(*command), "~nobody-of-this-name")  # type: ignore[arg-type]
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "1" + "0" * 30, "99999999TB"])
def test_a_size_beyond_all_machines_is_refused(run: CommandLine, model: Path, size: str) -> None:
    for option in ("--memory-limit", "--target-size"):
        refused(run("compress", model, "--dry-run", option, size), option, "is more than any machine has")


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_pipes_and_endless_files_are_refused(run: CommandLine, model: Path, tmp_path: Path, kind: str) -> None:
    def made(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    for suffix in ("txt", "jsonl", "json", "csv", "parquet"):
        refused(run("score", model, "--calibration", made(f"data.{suffix}")), "no regular file")
    refused(run("compress", model, "--plan", made("plan.json"), "--dry-run", "--no-eval"), "no regular file")
    refused(run("report", made("surgery.json"), "--output", tmp_path / "page.html"), "no regular file")
    made("sweep/sweep.json")
    refused(run("sweep", model, "--target-layers", 3, "--output", tmp_path / "sweep"), "no regular file")


def test_pipes_in_a_cache_are_not_waited_for(run: CommandLine, model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--cache", tmp_path / "cache"]
    assert score(run, model, text, *arguments).code == 0
    for file in ("statistics.json", "*.safetensors"):
        (found,) = list((tmp_path / "cache").glob(f"*/{file}"))[:1]
        found.unlink()
        os.mkfifo(found)
        outcome = score(run, model, text, *arguments)
        assert outcome.code == 0 and "no regular file" in outcome.err


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nerror: b", "a\x9b31mb", "a\u202eb", "a\rb"])
def test_names_are_printed_and_not_obeyed(run: CommandLine, model: Path, text: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(model, tmp_path / name)
    data = shutil.copy(text, tmp_path / f"{name}.txt")
    removal = ["--layers", 1, "--keep", 0, "--no-refit", "--sequence-length", 16, "--eval-data", data]
    output = tmp_path / f"{name}-output"
    outcomes = [
        run("compress", path, *removal, "--output", output),
        run("compress", path, *removal, "--output", output),
        run("evaluate", path, "--sequence-length", 16, "--eval-data", data, "--json"),
        run("report", output),
        run("score", tmp_path / f"{name}-nowhere"),
        run("score", model, f"--{name}"),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 2, 0, 0, 2, 2]
    for outcome in outcomes:
        assert not set("\x1b\x9b\r\u202e") & set(outcome.err)
        assert not set("\x1b\x9b\r") & set(outcome.out)
        assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == (outcome.code == 2)


AS_SOMEBODY_ELSE = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become somebody else")


@AS_SOMEBODY_ELSE
@pytest.mark.parametrize("place", ["config", "weights", "model", "parent", "cache", "report", "page"])
def test_what_may_not_be_read_or_written_is_refused(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, place: str
) -> None:
    """In a process of its own as another user, for whom the rights count."""
    path = shutil.copytree(model, tmp_path / "model")
    result = tmp_path / "result"
    layer_surgery.compress(path, result, layers=[1], keep=0, refit=False, eval_data=None)
    (tmp_path / "closed").mkdir()
    locked, command = {
        "config": (path / "config.json", ["score", path]),
        "weights": (path / "model.safetensors", ["score", path]),
        "model": (path, ["score", path]),
        "parent": (tmp_path / "closed", ["compress", path, "--layers", 1, "--output", tmp_path / "closed" / "output"]),
        "cache": (tmp_path / "closed", ["score", path, "--cache", tmp_path / "closed" / "cache"]),
        "report": (result / "surgery.json", ["report", result]),
        "page": (result, ["report", result]),
    }[place]
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    locked.chmod(0o555 if place == "page" else 0)
    arguments = [*command, *(["--calibration", text, "--samples", 4] if command[0] != "report" else [])]
    with as_nobody():
        outcome = run(*arguments)  # type: ignore[arg-type]
    refused(outcome)


class as_nobody:
    """A block in which this process has the rights of a user who owns nothing."""

    def __enter__(self) -> None:
        os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(0)


# Gone while a run works


def test_weights_that_go_away_are_said_to_have_gone(
    run: CommandLine, copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = sys.modules["layer_surgery.runs.session"].load_tokenizer

    def gone(checkpoint: Any) -> Any:
        tokenizer = opened(checkpoint)
        (copy / "model.safetensors").unlink()
        return tokenizer

    monkeypatch.setattr("layer_surgery.runs.session.load_tokenizer", gone)
    refused(score(run, copy, text), "model.safetensors has gone or changed")


def test_an_output_whose_folder_goes_away_is_a_failure(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        shutil.rmtree(tmp_path / "new")

    monkeypatch.setattr("layer_surgery.runs.output.write_page_and_card", gone)
    options = ["--layers", 1, "--keep", 0, "--no-refit", "--no-eval", "--output", tmp_path / "new" / "output"]
    refused(run("compress", model, *options), "writing to --output", code=1)
    assert listing(tmp_path) == {}


# Numbers


def huge(place: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[place].flatten()[3] = 3e38

    return edit


@pytest.mark.parametrize("scorer", ["angular", "block_influence", "fisher", "perplexity", "taylor"])
@pytest.mark.parametrize(
    "place", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_weight_that_overflows_is_found_by_every_scorer(
    run: CommandLine, copy: Path, text: Path, scorer: str, place: str
) -> None:
    edit_tensors(copy, huge(place))
    outcome = score(run, copy, text, "--scorer", scorer)
    where = "after layer" if "layers" in place else "logits"
    refused(outcome, where, "not finite", "check the checkpoint's weights", code=1)
    if "layers" in place:
        assert f"after layer {place.split('.')[2]} " in outcome.error_lines[-1]


def test_float16_that_overflows_names_the_dtype_to_take(run: CommandLine, text: Path, tmp_path: Path) -> None:
    model = model_with_vocabulary()
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").mul_(1e7)
    path = saved_model(tmp_path / "model", model=model)
    assert score(run, path, text).code == 0
    outcome = score(run, path, text, "--dtype", "float16")
    refused(outcome, "after layer 2 ", "overflow", "--dtype bfloat16", "--dtype float32", code=1)
    assert "architecture" not in outcome.err


# Options


@pytest.mark.parametrize("method", ["svd", "mix", "fisher"])
@pytest.mark.parametrize("keep", ["1e-9", "0.0001"])
def test_to_keep_almost_nothing_is_refused_and_not_taken_for_nothing(
    run: CommandLine, model: Path, text: Path, keep: str, method: str
) -> None:
    data = ["--calibration", text, "--samples", 4, "--sequence-length", 16, "--no-eval", "--dry-run"]
    outcome = run("compress", model, "--layers", 1, "--keep", keep, "--method", method, "--no-refit", *data)
    refused(outcome, "cannot be reached")


def test_an_option_for_one_value_is_taken_once(run: CommandLine, model: Path, tmp_path: Path) -> None:
    for option in ("--target-layers", "--keep", "--method", "--output", "--seed"):
        outcome = run("compress", model, option, 1, option, 2)
        refused(outcome, f"{option} is given 2 times; give it once.")
    refused(run("report", tmp_path, "--output", "a", "--output", "b"), "--output is given 2 times")
    layers = run("compress", model, "--layers", 1, "--layers", 2, "--keep", 0, "--no-refit", "--no-eval", "--dry-run")
    assert "4 layers -> 2" in layers.out or "2 of 4" in layers.out


def test_a_task_that_is_none_is_refused_before_the_model_is_opened(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "layer_surgery.evaluation.tasks", None)
    for command in (["evaluate"], ["compress", "--layers", 1, "--dry-run"], ["sweep", "--target-layers", 3]):
        output = ["--output", tmp_path / "output"] if command[0] == "sweep" else []
        outcome = run(command[0], tmp_path / "nowhere", *command[1:], *output, "--tasks", "helaswag")
        refused(outcome, "unknown task 'helaswag'. Did you mean 'hellaswag'?")


@pytest.mark.parametrize(
    ("condition", "allowed"),
    [
        ("perplexity<=-1", "1 or more"),
        ("perplexity<=0.5", "1 or more"),
        ("perplexity<=-1x", "0 or more"),
        ("kl_divergence<=-0.1", "0 or more"),
        ("top1_agreement>=1.5", "0 to 1"),
    ],
)
def test_a_condition_that_no_model_meets_is_refused(
    run: CommandLine, model: Path, tmp_path: Path, condition: str, allowed: str
) -> None:
    outcome = run("sweep", model, "--target-layers", 3, "--output", tmp_path / "output", "--best", condition)
    refused(outcome, f"--best is '{condition}', but no model has such a", f"allowed: {allowed}.")
