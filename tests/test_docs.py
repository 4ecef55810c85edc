"""The documentation: every command in it runs, every link leads somewhere, and what it lists is what there is.

Commands run as they stand, in this process, in a directory where the names that they use are files: `MODEL` is a tiny
random checkpoint with 12 layers, `smaller/` a result made of it. Only what makes them fast is put before their options.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from tiny_checkpoints import REPOSITORY, CommandLine, saved_model, text_file

import layer_surgery
from layer_surgery.checkpoint.architectures import ARCHITECTURES
from layer_surgery.checkpoint.costs import TokenCosts
from layer_surgery.cli.main import cli
from layer_surgery.config import CalibrationConfig
from layer_surgery.healing.losses import LOSSES
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.scoring import SCORERS
from layer_surgery.surgeon import METHODS

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    *(
        REPOSITORY / name
        for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "experiments/README.md", "reports/README.md")
    ),
    REPOSITORY / "experiments" / "demo" / "README.md",
    REPOSITORY / "reports" / "demo" / "README.md",
]
ROWS_OF_README = 150

#: Commands of the documentation that are not run here, and why.
NOT_RUN = {
    "make demo": "tests/runs/test_demo.py compresses the same checkpoint; here it would take minutes",
    "make test": "it runs this test",
    "torchrun --nproc-per-node 2 -m layer_surgery compress MODEL --target-layers 9 --output shared-out/": (
        "tests/runs/test_processes.py starts processes"
    ),
    "pip install .": "it changes the environment that the tests run in",
    "layer-surgery compress MODEL --target-layers 9 --calibration wikitext2 --eval-data wikitext2 --output wiki/": (
        "it needs the network"
    ),
    (
        "layer-surgery compress CLASSIFIER --calibration labelled.jsonl --eval-data held-out.jsonl "
        "--target-parameters 0.6 --output half/"
    ): "tests/runs/test_encoders.py does this; the models here have no labels",
    (
        "layer-surgery heal smaller-classifier/ --data labelled.jsonl --loss kl --loss ce:0.5 --tokens 200000 "
        "--output healed-classifier/"
    ): "tests/runs/test_heal_heads.py does this; the models here have no labels",
    (
        "layer-surgery compress EMBEDDER --target-parameters 0.7 --calibration text.txt --output half/"
    ): "tests/runs/test_embedders.py does this; the models here give no vectors",
    "layer-surgery heal smaller-embedder/ --data texts.txt --minutes 10 --output healed-embedder/": (
        "tests/runs/test_heal_embedders.py does this; the models here give no vectors"
    ),
    (
        "layer-surgery heal smaller-embedder/ --data texts.txt --teacher EMBEDDER --teacher ANOTHER "
        "--output healed-by-two/"
    ): "tests/runs/test_heal_teachers.py does this; the models here give no vectors",
    "layer-surgery evaluate smaller-embedder/ --baseline EMBEDDER --tasks STSBenchmark,STS22:en,NFCorpus": (
        "tests/evaluation/test_embedding_tasks.py does this; the data are on the hub"
    ),
}

#: Put before the options of a command, so that what the documentation says comes later and counts.
FAST = {
    "--samples": "8",
    "--sequence-length": "16",
    "--eval-windows": "4",
    "--continuations": "0",
    "--limit": "2",
    "--speed-new-tokens": "2",
    "--learning-rate": "1e-4",
    "--speed-repeats": "1",
    "--speed-lengths": "8",
}
#: In the place of what a command says, where it would take its time.
SHORTER = {"--tokens": "800", "--heal-tokens": "800"}
#: The same for the functions that blocks of Python call.
FAST_ARGUMENTS: dict[str, Any] = {"samples": 8, "sequence_length": 16, "eval_windows": 4, "continuations": 0}
HEAL_ARGUMENTS = {name: value for name, value in FAST_ARGUMENTS.items() if name != "samples"}
#: Nothing depends on these, they have tests of their own, and they take two thirds of the time. They run on two pages.
SLOW: dict[str, Callable[..., Any]] = {
    "layer_surgery.runs.evaluator.token_costs": lambda *_: TokenCosts(None, None),
    "layer_surgery.reporting.page.report_page": lambda *_, **__: "<p>not drawn</p>",
}
DONE_WHOLE = ("evaluation.md", "loading.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and content of each fenced block."""
    return [(match[1], match[2]) for match in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(block: str) -> list[str]:
    """Return the commands of a block of shell, each on one line and without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def documented_commands() -> list[str]:
    """Return every command of every page."""
    return [
        command
        for page in PAGES
        for language, content in blocks(page)
        if language in ("sh", "bash")
        for command in commands(content)
    ]


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 12, "max_position_embeddings": 512}
    return saved_model(tmp_path_factory.mktemp("docs") / "MODEL", layers=12, **sizes)


@pytest.fixture(scope="module")
def smaller(model: Path) -> Path:
    """The result that the pages under docs/ begin with."""
    output = model.parent / "smaller"
    layer_surgery.compress(model, output, target_layers=9, eval_data=None, samples=8, sequence_length=16)
    return output


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which a page's commands run."""
    (tmp_path / "MODEL").symlink_to(model, target_is_directory=True)
    text_file(tmp_path / "held-out.txt")
    rows = [{"prompt": f"one {number}", "answer": "the answer"} for number in range(60)]  # each within 16 tokens
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / ".modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds the folder above to it
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return what runs one command as it stands, but faster, and fails where it does not end with 0."""
    command_line = CommandLine(monkeypatch, capsys)

    def run_command(command: str) -> None:
        program, name, *rest = shlex.split(command)
        assert program == "layer-surgery", f"there is no way to run this here; say why in NOT_RUN: {command}"
        known = options_of(cli.commands[name]) if name in cli.commands else set()
        wanted = {option: value for option, value in FAST.items() if option in known}
        needed_by = {"--limit": "--tasks" in rest, "--continuations": "--prompt" not in rest}
        needed_by |= {option: "--speed" in rest for option in FAST if option.startswith("--speed-")}
        for option, needed in needed_by.items():
            if not needed:
                wanted.pop(option, None)
        rest = [SHORTER.get(before, word) for before, word in zip(["", *rest], rest, strict=False)]
        outcome = command_line(name, *(word for pair in wanted.items() for word in pair), *rest)
        assert outcome.code == 0, f"{command}\n{outcome.err}"

    return run_command


@pytest.fixture
def fast_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, taken in (
        ("compress", FAST_ARGUMENTS),
        ("heal", HEAL_ARGUMENTS),
        ("score", {"samples": 8, "sequence_length": 16}),
    ):
        function = getattr(layer_surgery, name)

        @functools.wraps(function)
        def fast(*args: Any, _function: Any = function, _taken: Any = taken, **kwargs: Any) -> Any:
            limit = {"limit": 2} if "tasks" in kwargs else {}
            return _function(*args, **(_taken | limit | kwargs))

        monkeypatch.setattr(layer_surgery, name, fast)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path,
    run: Callable[[str], None],
    fast_functions: None,
    place: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page.name not in DONE_WHOLE:
        for function, stand_in in SLOW.items():
            monkeypatch.setattr(function, stand_in)
    if page.name != "README.md":
        shutil.copytree(request.getfixturevalue("smaller"), place / "smaller")
    for number, (language, content) in enumerate(blocks(page), start=1):
        assert language in ("", "sh", "python", "yaml"), f"block {number} is in {language}, which nothing here runs"
        if language == "sh":
            for command in commands(content):
                if command not in NOT_RUN:
                    run(command)
        elif language == "yaml":
            (place / "block.yaml").write_text(content, encoding="utf-8")
            assert parse_losses([str(place / "block.yaml")])
        elif language == "python":
            exec(compile(content, f"{page.name}, block {number}", "exec"), {})


def test_what_is_not_run_is_in_the_documentation() -> None:
    assert set(NOT_RUN) <= set(documented_commands())


def test_options_of_what_is_not_run_are_there() -> None:
    checked = [shlex.split(command) for command in NOT_RUN if command.startswith("layer-surgery ")]
    assert checked
    for _program, name, *rest in checked:
        cli.commands[name].make_context(name, rest)


@pytest.mark.parametrize(
    "wrong",
    [
        "layer-surgery compress MODEL --target-layer-count 9 --dry-run",
        "layer-surgery compress MODEL --target-layers 9 --method fischer --dry-run",
        "layer-surgery compresss MODEL --target-layers 9 --dry-run",
        "layer-surgery evaluate no-such-directory/",
        "layerlift compress MODEL",
    ],
)
def test_a_wrong_command_does_not_pass(run: Callable[[str], None], place: Path, wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        run(wrong)


def test_comments_and_continued_lines_are_no_commands() -> None:
    block = "# first\nlayer-surgery score MODEL   # the layers\n\nlayer-surgery \\\n    evaluate 'a b'\n"
    assert commands(block) == ["layer-surgery score MODEL", "layer-surgery evaluate 'a b'"]


def mentioned_options(text: str) -> set[str]:
    """Return the options in inline code."""
    return {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<![\w-])--[a-z-]+", code)}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_option_in_the_text_is_there(page: Path) -> None:
    known = {"--help", "--version"}.union(*map(options_of, cli.commands.values()))
    assert mentioned_options(prose(page)) - known == set()


def test_an_option_that_is_not_there_is_seen() -> None:
    assert mentioned_options("say `--keep 0` and `--foo-bar X`, not --this or `a--b`") == {"--keep", "--foo-bar"}


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        yield slug(heading)


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links to files or headings that are not there; addresses on the network are not asked."""
    broken = []
    for match in _LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_relative_to(REPOSITORY) or not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page, prose(page)) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](docs/no-such.md) [b](README.md#no-such) [c](README.md#limits) [d](https://e.f) ![g](../outside.png)"
    assert broken_links(REPOSITORY / "README.md", text) == ["docs/no-such.md", "README.md#no-such", "../outside.png"]


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= ROWS_OF_README


def test_every_model_type_is_listed() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / "loading.md").read_text(encoding="utf-8")
    listed = re.search(r"Listed are (.*?)\. Each", page, re.DOTALL)
    assert listed is not None
    assert re.findall(r"`([\w-]+)`", listed[1]) == sorted(ARCHITECTURES)
    assert f"{len(ARCHITECTURES)} model types" in readme


def test_options_lists_every_scorer_and_method() -> None:
    section = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8").split("## Scorers and methods")[1]
    rows = re.findall(r"^\| (`.+?) \|", section.split("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted([*SCORERS.names, *METHODS.names])


def test_healing_lists_every_loss_that_heal_takes() -> None:
    page = (REPOSITORY / "docs" / "healing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page.split("\n## Losses")[1].split("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(loss.name for loss in LOSSES)


def test_defaults_in_the_documentation_are_those_of_the_program() -> None:
    options = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8")
    assert f"sequences (default {CalibrationConfig().samples})" in options
    assert f"tokens in each (default {CalibrationConfig().sequence_length})" in options


def test_the_newest_release_in_the_changelog_is_this_one_and_has_a_date() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [heading for heading in re.findall(r"^## (.+)$", changelog, re.MULTILINE) if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", version) for version in versions)
    assert versions[0].split()[0] == layer_surgery.__version__


def test_design_names_the_schema_versions() -> None:
    from layer_surgery.records import REPORT_SCHEMA_VERSION
    from layer_surgery.records.sweep import SCHEMA_VERSION

    design = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"`surgery.json` (schema version {REPORT_SCHEMA_VERSION})" in design
    assert f"`sweep.json` (schema version {SCHEMA_VERSION})" in design
