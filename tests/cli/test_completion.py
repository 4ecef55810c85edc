"""What the tab key gives: names from the declarations of the options, and paths; nothing slow is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from tiny_checkpoints import CommandLine

from layer_surgery.cli.main import cli
from layer_surgery.config import COMPONENTS
from layer_surgery.config.choices import METHOD_CHOICES, SCORER_CHOICES

VARIABLE = "_LAYER_SURGERY_COMPLETE"


def completed(*words: str) -> list[str]:
    """Return what completes the last word, as the shell gets it; a kind of path is `<file>` or `<dir>`."""
    *before, incomplete = words
    items = ShellComplete(cli, {}, "layer-surgery", VARIABLE).get_completions(before, incomplete)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in items]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sc",), ["score"]),
        (
            ("compress", "--targ"),
            [f"--target-{of}" for of in ("layers", "parameters", "size", "flops", "kv-cache", "time")],
        ),
        (("compress", "MODEL", "--scorer", ""), list(SCORER_CHOICES)),
        (("score", "--scorer", "p"), ["perplexity"]),
        (("compress", "--method", "gr"), ["grasp", "grasp_sequential"]),
        (("sweep", "--method", "svd,re"), ["svd,replaceme", "svd,remove"]),
        (("compress", "--components", ""), list(COMPONENTS)),
        (("compress", "--components", "heads,"), [f"heads,{name}" for name in COMPONENTS if name != "heads"]),
        (("compress", "--tasks", "bundled_c"), ["bundled_cloze", "bundled_copying"]),
        (("compress", "--tasks", "my"), ["<file>"]),
        (("compress", "--dtype", ""), ["auto", "float32", "bfloat16", "float16"]),
        (("compress", "--device", "c"), ["cpu", "cuda"]),
        (("compress", "--remove", "a"), ["attention"]),
        (("compress", "--refit-scope", "a"), ["all"]),
        (("compress", "--calibration", "b"), ["bundled"]),
        (("evaluate", "--eval-data", "./"), ["<file>"]),
        (("compress", "--plan", ""), ["<file>"]),
        (("compress", "--output", ""), ["<dir>"]),
        (("compress", "--cache", ""), ["<dir>"]),
        (("compress", "--task-path", ""), ["<dir>"]),
        (("evaluate", "--baseline", ""), ["<dir>"]),
        (("compress", ""), ["<dir>"]),
        (("export", ""), ["<dir>"]),
        (("report", "--output", ""), ["<file>"]),
        (("completion", "z"), ["zsh"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_values_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_names_come_with_what_they_mean() -> None:
    items = ShellComplete(cli, {}, "layer-surgery", VARIABLE).get_completions(["compress", "--method"], "")
    assert {item.value: item.help for item in items} == {name: each.summary for name, each in METHOD_CHOICES.items()}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_the_program(run: CommandLine, shell: str) -> None:
    outcome = run("completion", shell)
    assert outcome.code == 0
    assert f"{VARIABLE}={shell}_complete" in outcome.out.replace("env ", "") and "layer-surgery" in outcome.out


def test_completing_imports_nothing_slow() -> None:
    script = (
        "import sys; sys.argv = ['layer-surgery']\n"
        "from layer_surgery.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "slow = {'torch', 'transformers', 'datasets', 'lm_eval', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": "layer-surgery compress --scorer bl", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,block_influence\n", "")
