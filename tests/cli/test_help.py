"""Help: options under headings, two examples a command, and nothing slow imported for it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
from tiny_checkpoints import CommandLine

import layer_surgery
from layer_surgery.cli.help import GroupedCommand
from layer_surgery.cli.main import cli
from layer_surgery.config import (
    LISTED_BELOW,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    HealConfig,
    ScoreConfig,
    SweepConfig,
    VerifyConfig,
)
from layer_surgery.config.choices import (
    BUNDLED_TASKS,
    DATA_CHOICES,
    LOSS_CHOICES,
    METHOD_CHOICES,
    SCORER_CHOICES,
)
from layer_surgery.config.declaring import GROUPS, Options, about_of, group_of, grouped
from layer_surgery.data import bundled_tasks, known_sources
from layer_surgery.healing.losses import LOSSES
from layer_surgery.scoring import SCORERS
from layer_surgery.surgeon import METHODS

CONFIGS = (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    HealConfig,
    ScoreConfig,
    SweepConfig,
    VerifyConfig,
)
COMMANDS = [name for name, command in cli.commands.items() if isinstance(command, GroupedCommand)]
SLOW = {"torch", "transformers", "datasets", "lm_eval", "numpy", "matplotlib", "pydantic"}


def sections(text: str) -> dict[str, str]:
    """Return what stands under each heading of a help text."""
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_has_a_heading_and_is_under_it_once(config: type[Options]) -> None:
    groups = grouped(config)
    assert set(groups) <= set(GROUPS) - {"Other"}, "name the GROUP of the class that declares the option"
    assert all(group_of(config, field) == group for group, fields in groups.items() for field in fields)
    assert max(Counter(field.name for fields in groups.values() for field in fields).values()) == 1


def test_compress_has_its_options_under_the_headings(run: CommandLine) -> None:
    found = sections(run("compress", "--help").out)
    assert list(found) == [*GROUPS[:-1], "Scorers", "Methods", "Components", "Losses to heal by", "Examples"]
    for heading, option in (
        ("Model and data", "--calibration"),
        ("Budget", "--target-parameters"),
        ("Surgery", "--refit-scope operated|all"),
        ("Healing", "--heal-minutes M"),
        ("Evaluation", "--no-eval"),
        ("Output", "--json"),
        ("Runtime", "--debug"),
    ):
        assert [name for name, text in found.items() if f"  {option} " in text] == [heading]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_80_columns(name: str, run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run(name, "--help").out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_two_examples_that_it_takes(name: str, run: CommandLine) -> None:
    text = sections(run(name, "--help").out)["Examples"].replace("\\\n", "")
    lines = [line.partition(" > ")[0] for line in text.splitlines() if line.startswith("    layer-surgery ")]
    commands = [shlex.split(line)[1:] for line in lines]
    assert len(commands) == 2
    for first, *rest in commands:
        assert first == name
        cli.commands[name].make_context(name, rest)


def test_what_is_listed_is_what_is_registered() -> None:
    # Listed apart from the functions, so that help and completion need not import them.
    assert set(SCORERS.names) == set(SCORER_CHOICES) and set(METHODS.names) == set(METHOD_CHOICES)
    assert set(DATA_CHOICES) == set(known_sources())
    assert set(LOSSES.names) == set(LOSS_CHOICES)
    group, *tasks = BUNDLED_TASKS
    listed = (bundled_tasks() / f"{group}.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^  - (bundled_\w+)$", listed, re.MULTILINE) == tasks


@pytest.mark.parametrize("arguments", ["compress --help", "sweep --help", "report --help"])
def test_help_of_a_command_imports_nothing_slow(arguments: str) -> None:
    script = (
        f"import sys; sys.argv = ['layer-surgery', *{arguments.split()}]\n"
        "from layer_surgery.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"slow = {SLOW} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_prints_nothing_and_imports_nothing_slow() -> None:
    script = f"import layer_surgery, sys; slow = {SLOW} & set(sys.modules); assert not slow, slow"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("function", "config"),
    [
        (layer_surgery.compress, CompressConfig),
        (layer_surgery.heal, HealConfig),
        (layer_surgery.score, ScoreConfig),
        (layer_surgery.evaluate, EvaluateConfig),
        (layer_surgery.sweep, SweepConfig),
        (layer_surgery.export_dense, ExportConfig),
    ],
)
def test_python_help_says_type_default_and_meaning_of_every_keyword(function: object, config: type[Options]) -> None:
    text = function.__doc__ or ""
    options = text.split("\nOptions:\n")[1].split("\n\n")[0]
    entries = {
        match[1]: " ".join(match[0].split())
        for match in re.finditer(r"^        (\w+) \(.*?(?=^        \w|^    \w|\Z)", options, re.MULTILINE | re.DOTALL)
    }
    for group, fields in grouped(config).items():
        named = [field for field in fields if field.name not in ("output",) or field.name in entries]
        assert not named or f"    {group}:\n" in options
        for field in named:
            entry = entries[field.name]
            assert about_of(field).help in entry and entry.endswith(")") and " (default: " in entry
    for option, heading, choices, _ in LISTED_BELOW:
        assert (f"\n{heading}:\n" in text) == (option in entries)
        assert option not in entries or all(f"    {name}" in text for name in choices)
