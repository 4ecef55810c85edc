"""Commands and settings without the folders of a machine."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from layer_surgery.records.provenance import portable, portable_command

ROOT = Path("/home/Ann Lee/project")


@pytest.mark.parametrize(
    ("words", "shortened"),
    [
        # below the root
        ([f"{ROOT}/models/a"], ["models/a"]),
        ([f"{ROOT}/models/../a b.txt"], ["a b.txt"]),
        ([f"{ROOT}"], ["."]),
        (["--calibration", f"{ROOT}/a.txt:2"], ["--calibration", "a.txt:2"]),
        # elsewhere
        (["/data/models/a/"], ["a"]),
        (["--output=/tmp/x/out", "--plan", "/tmp/plan.json"], ["--output=out", "--plan", "plan.json"]),
        (["--calibration=/data/my books/a.txt:0.5"], ["--calibration=a.txt:0.5"]),
        ([f"{ROOT}-2/a"], ["a"]),
        (["/home/ann/../bob/a"], ["a"]),
        (["//server/share"], ["share"]),
        # what is no absolute path
        (["/", "--sign=/", "", "--", "-", "1/2", "--keep=0.5", "-1e-3"], None),
        (["../a", "./a", "~/a", "owner/name#config@train[:10]", "--model=a/b"], None),
        (["https://host/a/b", "--url=https://host/a", "file:///a/b"], None),
        (["/ and what follows", "// a comment", "/* int */", "say /a/b"], None),
        (["--prompt", "/a/b is", "--prompt=/a/b is", "perplexity<=1.1x"], None),
        (["--prompt", "/a/b", "--output", "/a/b"], ["--prompt", "/a/b", "--output", "b"]),
    ],
    ids=str,
)
def test_absolute_paths_in_a_command_are_shortened(words: list[str], shortened: list[str] | None) -> None:
    command = portable_command(["layer-surgery", *words], ROOT)
    assert shlex.split(command) == ["layer-surgery", *(words if shortened is None else shortened)]


def test_below_the_top_of_the_file_system_only_last_names_stay() -> None:
    assert portable_command(["/usr/bin/python", "/"], Path("/")) == "python /"


def test_the_root_is_the_current_directory_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable_command([f"{tmp_path}/a/b c", f"{tmp_path}.txt"]) == f"'a/b c' {tmp_path.name}.txt"
    assert portable({"output": f"{tmp_path}/out"}) == {"output": "out"}


def test_settings_keep_everything_but_absolute_paths() -> None:
    settings = {
        "output": "/tmp/x/out",
        "calibration": {"sources": [f"{ROOT}/a.txt:2", "bundled"], "samples": 3, "text_column": None},
        "evaluation": {"prompts": ["/a/b is"], "sources": ("/data/b.txt",)},
        "/a/key": [{"plan": "/tmp/plan.json"}, 0.5, True],
    }
    before = repr(settings)
    assert portable(settings, ROOT) == {
        "output": "out",
        "calibration": {"sources": ["a.txt:2", "bundled"], "samples": 3, "text_column": None},
        "evaluation": {"prompts": ["/a/b is"], "sources": ["b.txt"]},
        "/a/key": [{"plan": "plan.json"}, 0.5, True],
    }
    assert repr(settings) == before


def test_committed_reports_hold_no_absolute_path() -> None:
    reports = Path(__file__).resolve().parents[2] / "reports"
    files = [path for suffix in ("json", "md", "csv", "html") for path in reports.rglob(f"*.{suffix}")]
    assert files or not reports.exists()  # a source distribution has none
    for file in files:
        text = file.read_text(encoding="utf-8").replace("&#34;", '"')
        assert re.findall(r"""(?:^|[\s"'=(:])/[A-Za-z][\w.-]*/[^\s"']*""", text) == [], file
