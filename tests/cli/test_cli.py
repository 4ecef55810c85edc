"""The command line: what goes to stdout and what to stderr, exit codes, and an end that leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError
from tiny_checkpoints import (
    DEMO,
    CommandLine,
    environment,
    finished,
    interrupt,
    listing,
    run_process,
    saved_model,
    strict_json,
    text_file,
)

import layer_surgery
from layer_surgery.config import DEFAULT_COMPONENTS
from layer_surgery.config.choices import DEFAULT_LOSSES, METHOD_CHOICES, SCORER_CHOICES
from layer_surgery.records import LayerScores
from layer_surgery.reporting.console import print_scores
from layer_surgery.scoring import SCORERS

SHORT = ("--sequence-length", 16)


@pytest.fixture(scope="module")
def low_rank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("low rank") / "output"
    layer_surgery.compress(model, output, layers=[1, 2], keep=0.3, method="svd", eval_data=None)
    return output


@pytest.fixture(scope="module")
def data(text: Path) -> list[str | Path]:
    return ["--calibration", text, "--samples", "4", "--sequence-length", "16"]


# Help


@pytest.mark.parametrize("command", [[], ["compress"], ["score"], ["evaluate"], ["sweep"], ["report"]], ids=str)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(run: CommandLine, command: list[str], flag: str) -> None:
    outcome = run(*command, flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: layer-surgery")


def test_help_lists_every_command(run: CommandLine) -> None:
    text = run("--help").out
    assert all(f"\n  {name} " in text for name in ("compress", "score", "evaluate", "sweep"))


def test_help_lists_scorers_and_methods_with_sources_defaults_and_how_to_mix_sources(run: CommandLine) -> None:
    compress, score = (" ".join(run(name, "--help").out.split()) for name in ("compress", "score"))
    for name, choice in (*SCORER_CHOICES.items(), *METHOD_CHOICES.items()):
        assert f" {name} " in compress and choice.source in compress
    assert compress.count("(default)") == 2 + len(DEFAULT_COMPONENTS) + len(DEFAULT_LOSSES)
    assert "Calibration sequences, from all sources together. [default: 128]" in compress
    assert "[default: 0.1]" in compress
    assert all(name in score for name in SCORERS.names)
    assert "grasp_sequential" not in score
    for text in (compress, score):
        assert "--calibration NAME|FILE[:WEIGHT] " in text
        assert "--calibration task.jsonl:2 --calibration bundled:1" in text
        assert "A weight (default 1) is a share of sequences, not of the tokens that carry loss" in text


def test_version_is_that_of_the_package(run: CommandLine) -> None:
    assert run("--version").out.strip() == f"layer-surgery, version {layer_surgery.__version__}"


def test_no_arguments_show_the_help(run: CommandLine) -> None:
    outcome = run()
    assert "Usage: layer-surgery" in outcome.out + outcome.err


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; sys.argv = ['layer-surgery', '--help']\n"
        "from layer_surgery.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "slow = {'torch', 'transformers', 'datasets', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(("given", "missing"), [("--target-layers=9", "--output"), ("--output=x", "--target-layers")])
def test_a_sweep_says_which_option_is_missing(run: CommandLine, given: str, missing: str) -> None:
    outcome = run("sweep", "model", given)
    assert outcome.code == 2
    assert f"Missing option '{missing}'" in outcome.err


# stdout and stderr


def test_compress_prints_a_report_or_as_json_that_on_disk(
    run: CommandLine, model: Path, text: Path, data: list[str | Path], tmp_path: Path
) -> None:
    output, json_output = tmp_path / "output", tmp_path / "json"
    arguments = ["compress", model, "--target-layers", 2, *data, "--eval-data", text, "--output"]
    shown, as_json = run(*arguments, output), run(*arguments, json_output, "--json")
    for outcome in (shown, as_json):
        assert outcome.code == 0
        beginnings = [line.split(":")[0] for line in outcome.error_lines]
        assert beginnings[:3] == ["calibration", "refit", "evaluation"]
        assert beginnings[3:] == [f"stage {number} of 6" for number in range(1, 7)]
    for part in ("2 of 4 layers whole", "perplexity", "change", f"saved to {output}"):
        assert part in shown.out
    assert (output / "surgery.json").is_file()
    assert strict_json(as_json.out) == strict_json((json_output / "surgery.json").read_text())


def test_the_report_holds_the_command_line_with_paths_below_the_current_directory(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--layers", 1, "--keep", 0, "--no-refit", "--no-eval", "--seed", 5]
    run("compress", model, "--output", tmp_path / "my output", *options)
    provenance = strict_json((tmp_path / "my output" / "surgery.json").read_text())["provenance"]
    words = ["layer-surgery", "compress", model.name, "--output", "my output", *map(str, options)]
    assert shlex.split(provenance["command"]) == words
    assert provenance["seed"] == 5
    assert provenance["config"]["layers"] == [1]


def test_score_ranks_every_layer(run: CommandLine, model: Path, data: list[str | Path]) -> None:
    outcome = run("score", model, *data)
    assert outcome.code == 0
    assert "fisher" in outcome.out
    scores = strict_json(run("score", model, *data, "--json").out)
    assert len(scores["values"]) == 4
    assert sorted(scores["removal_order"]) == [0, 1, 2, 3]
    assert scores["tokens"] == 4 * 16
    rows = [line.split() for line in outcome.out.splitlines() if line.strip()[:1].isdigit()]
    assert [int(row[1]) for row in rows] == scores["removal_order"]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_an_order_that_is_not_that_of_the_values_is_explained(
    capsys: pytest.CaptureFixture[str], order: list[int]
) -> None:
    scores = LayerScores(scorer="fisher", source="", quantity="", values=[0.1, 0.2, 0.3], removal_order=order, tokens=1)
    print_scores(Console(), scores)
    assert ("the order is of layers together" in capsys.readouterr().out) == (order != [0, 1, 2])


@pytest.mark.parametrize("where", [".", "inside/.."])
def test_a_model_that_is_the_current_directory_goes_by_its_name(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    here = tmp_path / "my model"
    shutil.copytree(model, here)
    (here / "inside").mkdir()
    monkeypatch.chdir(here)
    done = run("compress", where, "--layers", 1, "--method", "remove", "--output", "../out", "--no-eval")
    assert done.out.startswith("my model: 3 of 4 layers whole; removed: 1\n")
    assert "`my model` made smaller by" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_advice_for_a_low_rank_model_works(run: CommandLine, low_rank: Path, data: list[str | Path]) -> None:
    arguments = ("compress", low_rank, "--target-layers", 2, *data, "--no-eval", "--no-save")
    advice = "--keep 0 --scorer block_influence"
    refused = run(*arguments, "--keep", 0.3)
    assert refused.code == 2 and f"remove outright with {advice}, or" in refused.err
    assert run(*arguments, *advice.split(), "--no-refit").code == 0


def test_parts_that_were_removed_are_not_called_low_rank(run: CommandLine, model: Path, tmp_path: Path) -> None:
    options = ("--remove", "mlp", "--keep", 0, "--method", "svd", "--no-eval")
    done = run("compress", model, "--layers", 2, *options, "--output", tmp_path / "out")
    assert "3 of 4 layers whole; parts removed: 2\n" in done.out


@pytest.mark.parametrize("scorer", SCORERS.names)
def test_score_takes_every_scorer(run: CommandLine, model: Path, data: list[str | Path], scorer: str) -> None:
    scores = strict_json(run("score", model, *data, "--scorer", scorer, "--target-layers", 2, "--json").out)
    assert scores["scorer"] == scorer
    assert len(scores["removal_order"]) >= 2
    assert all(isinstance(value, float) for value in scores["values"])


@pytest.mark.parametrize("target", [0, 4])
def test_score_refuses_an_impossible_target(run: CommandLine, model: Path, data: list[str | Path], target: int) -> None:
    outcome = run("score", model, *data, "--target-layers", target)
    assert outcome.code == 2
    assert f"--target-layers is {target}; allowed: 1 to 3" in outcome.err


def test_evaluate_measures_one_model(run: CommandLine, model: Path, text: Path) -> None:
    outcome = run("evaluate", model, "--eval-data", text, "--sequence-length", 16)
    assert outcome.code == 0
    assert "perplexity" in outcome.out and "parameters" in outcome.out
    result = strict_json(run("evaluate", model, "--eval-data", text, "--sequence-length", 16, "--json").out)
    assert result["baseline"] is None
    assert result["model"]["layers"] == 4
    assert result["model"]["perplexity"][str(text)]["value"] > 1


def test_evaluate_takes_a_low_rank_model_and_a_baseline(
    run: CommandLine, model: Path, low_rank: Path, text: Path
) -> None:
    arguments = ["evaluate", low_rank, "--baseline", model, "--eval-data", text, "--sequence-length", 16]
    outcome = run(*arguments)
    assert outcome.code == 0
    assert "baseline" in outcome.out and "change" in outcome.out
    result = strict_json(run(*arguments, "--json").out)
    alone = strict_json(run("evaluate", model, "--eval-data", text, "--sequence-length", 16, "--json").out)
    assert result["baseline"] == alone["model"]
    assert result["model"]["parameters"] < result["baseline"]["parameters"]
    assert result["model"]["perplexity"] != result["baseline"]["perplexity"]


def test_evaluate_takes_several_texts(run: CommandLine, model: Path, text: Path, tmp_path: Path) -> None:
    other = text_file(tmp_path / "other.txt", seed=1)
    data = ["--eval-data", text, "--eval-data", other, *SHORT, "--eval-windows", 3]
    outcome = run("evaluate", model, *data, "--json")
    measured = strict_json(outcome.out)["model"]["perplexity"]
    assert list(measured) == [str(text), str(other)]
    assert {result["windows"] for result in measured.values()} == {3}


def test_without_saving_it_says_the_numbers_and_writes_nothing(
    run: CommandLine, model: Path, text: Path, data: list[str | Path], tmp_path: Path
) -> None:
    outcome = run("compress", model, "--target-layers", 2, *data, "--eval-data", text, "--no-save")
    assert outcome.code == 0
    assert "perplexity" in outcome.out
    assert "saved" not in outcome.out
    assert listing(tmp_path) == {}


def test_names_that_look_like_markup_are_printed_as_they_are(run: CommandLine, tmp_path: Path) -> None:
    path, text = saved_model(tmp_path / "[red]model"), text_file(tmp_path / "[blue]text.txt")
    output = tmp_path / "[bold]output"
    removal = ["--layers", 1, "--keep", 0, "--no-refit"]
    compressed = run("compress", path, *removal, *SHORT, "--eval-data", text, "--output", output)
    evaluated = run("evaluate", output, *SHORT, "--eval-data", text)
    assert (compressed.code, evaluated.code) == (0, 0)
    shown = ["".join(text.split()) for text in (compressed.out, compressed.err, evaluated.out)]  # long names are folded
    assert "[red]model:3of4" in shown[0]
    assert all("[blue]text.txt" in text for text in shown)
    assert "[bold]output" in shown[0] and "[bold]output" in shown[2]


# Exit codes


def test_an_existing_output_is_a_mistake_of_the_user_and_overwrite_replaces_it(
    run: CommandLine, model: Path, tmp_path: Path
) -> None:
    arguments = ["compress", model, "--layers", 1, "--keep", 0, "--no-refit", "--no-eval"]
    arguments += ["--output", tmp_path / "output"]
    assert run(*arguments).code == 0
    before = listing(tmp_path)
    refused = run(*arguments)
    assert refused.code == 2
    assert refused.error_lines[-1].startswith("error: --output ") and "--overwrite" in refused.err
    assert listing(tmp_path) == before
    assert run(*arguments, "--overwrite", "--seed", 1).code == 0
    assert listing(tmp_path).keys() == before.keys()
    assert listing(tmp_path) != before


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_SPACE_FOR_FACTORS = SafetensorError("I/O error: No space left on device")
NO_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("place", "error", "code", "message"),
    [
        ("checkpoint.save.StreamedSafetensors.write", NO_SPACE, 1, "error: .*No space left on device"),
        ("checkpoint.new_tensors.save_file", NO_SPACE_FOR_FACTORS, 1, "error: .*No space left on device"),
        ("runs.output.report_dict", NO_SPACE, 1, "error: .*No space left on device"),
        ("runs.session.tempfile.mkdtemp", NO_SPACE, 2, r"error: scratch files .* \(No space left on device\)\.$"),
        ("runs.bench.result_checkpoint", NO_MEMORY, 1, "error: .*--batch-size"),
        ("runs.bench.result_checkpoint", KeyboardInterrupt(), 130, "interrupted; nothing half-written is left.$"),
    ],
    ids=["weights", "factors", "report", "scratch", "memory", "interrupted"],
)
def test_a_run_that_cannot_go_on_says_why_and_leaves_nothing(
    run: CommandLine,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"layer_surgery.{place}", stop)
    options = ["--layers", 1, "--keep", 0.3, "--method", "svd", "--no-eval", "--output", tmp_path / "new" / "output"]
    outcome = run("compress", model, *options)
    assert outcome.code == code
    *stages, line = outcome.error_lines
    assert re.match(message, line) and all(stage.startswith("stage ") for stage in stages)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_signals_in_the_middle_of_the_work_leave_nothing_even_if_there_are_many(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """One at work, and one at each removal that follows it."""
    removed = shutil.rmtree

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    def remove(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        removed(*arguments, **options)

    monkeypatch.setattr("layer_surgery.runs.bench.result_checkpoint", stop)
    monkeypatch.setattr(shutil, "rmtree", remove)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["--layers", 1, "--keep", 0, "--no-refit", "--no-eval", "--output", tmp_path / "new" / "output"]
    outcome = run("compress", model, *options)
    assert outcome.code == code
    assert outcome.error_lines[-1] == "interrupted; nothing half-written is left."
    assert all(line.startswith("stage ") for line in outcome.error_lines[:-1])
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_that_a_library_makes_an_error_of_is_one_all_the_same(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def stop(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            raise ValueError("Invalid affine transformation matrix") from None

    monkeypatch.setattr("layer_surgery.runs.bench.result_checkpoint", stop)
    options = ["--layers", 1, "--keep", 0, "--no-refit", "--no-eval", "--output", tmp_path / "output"]
    outcome = run("compress", model, *options)
    assert outcome.code == code
    assert outcome.error_lines[-1] == "interrupted; nothing half-written is left."
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_in_a_finalizer_stops_a_run_all_the_same(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    class Signals:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def stop(*_: object, **__: object) -> None:
        signals = Signals()
        del signals
        time.sleep(20)
        pytest.fail("the run went on")

    monkeypatch.setattr("layer_surgery.runs.bench.result_checkpoint", stop)
    options = ["--layers", 1, "--keep", 0, "--no-refit", "--no-eval", "--output", tmp_path / "output"]
    outcome = run("compress", model, *options)
    assert outcome.code == code
    assert outcome.error_lines[-1] == "interrupted; nothing half-written is left."
    assert listing(tmp_path) == {}


#: Sends a signal to itself when a module is looked for, and is `python -m layer_surgery` otherwise.
SIGNALLED_AT_AN_IMPORT = """
import os, runpy, sys

module, number, *command = sys.argv[1:]

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Signals())
sys.argv = ["layer-surgery", *command]
runpy.run_module("layer_surgery", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        ("click", signal.SIGINT, 130),
        ("layer_surgery.cli.options", signal.SIGINT, 130),
        ("torch", signal.SIGINT, 130),
        ("torch", signal.SIGHUP, 129),
        ("transformers.modeling_utils", signal.SIGTERM, 143),
    ],
)
def test_a_signal_while_modules_are_imported_is_no_traceback(
    model: Path, tmp_path: Path, module: str, number: int, code: int
) -> None:
    command = [sys.executable, "-c", SIGNALLED_AT_AN_IMPORT, module, str(int(number)), "score", str(model)]
    outcome = finished(command, tmp_path, 120)
    assert (outcome.code, outcome.error_lines) == (code, ["interrupted; nothing half-written is left."])


# As a process of its own


@pytest.mark.slow
def test_the_process_ends_with_2_one_line_and_no_traceback_for_a_mistake(model: Path, tmp_path: Path) -> None:
    outcome = run_process("compress", model, "--target-layers", "9", "--output", "output", home=tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    (message,) = outcome.err.splitlines()
    assert message.startswith("error: --target-layers is 9")
    assert "output" not in listing(tmp_path)


@pytest.mark.slow
def test_the_process_shows_a_traceback_with_debug(model: Path, tmp_path: Path) -> None:
    outcome = run_process("compress", model, "--target-layers", "9", "--dry-run", "--debug", home=tmp_path)
    assert outcome.code != 0
    assert "Traceback (most recent call last)" in outcome.err
    assert "PlanError" in outcome.err


@pytest.mark.slow
def test_the_process_prints_json_alone_on_stdout(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--layers", "1", "--method", "svd", "--eval-data", text, "--sequence-length", "16"]
    outcome = run_process("compress", model, *arguments, "--output", "output", "--json", home=tmp_path)
    assert outcome.code == 0, outcome.err
    assert strict_json(outcome.out)["plan"]["target_layers"] == 3
    assert all(line.startswith(("evaluation: ", "stage ")) for line in outcome.error_lines)


def test_the_installed_command_is_this_main() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="layer-surgery")
    assert entry.value == "layer_surgery.cli.main:main"


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 2.5], ids=["at the beginning", "at work"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_no_output_and_no_leftovers(tmp_path: Path, number: int, code: int, wait: float) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "layer_surgery", "compress", str(DEMO), "--target-layers", "6"]
    command += ["--method", "grasp_sequential", "--samples", "64", "--output", "new/output"]
    variables, pipe = environment(tmp_path) | {"TMPDIR": str(temporary)}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=work, env=variables, stdout=pipe, stderr=pipe, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(work.glob("new/.output.partial-*")):
            assert process.poll() is None and time.monotonic() < deadline, "the work did not begin"
            time.sleep(0.02)
        time.sleep(wait)
        assert list(work.glob("new/.output.partial-*")), "the work was done before the signal was sent"
        outcome = interrupt(process, number)
    finally:
        process.kill()
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    assert listing(work) == {}
    assert listing(temporary) == {}
