"""Results are never lost: what is at `--output` when a run ends, what is beside it, and what a killed run has left."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import listing, saved_model

import layer_surgery
from layer_surgery.checkpoint import output as output_module
from layer_surgery.checkpoint.contents import list_files, not_ours
from layer_surgery.checkpoint.output import staged_directory
from layer_surgery.disk import locks, own, renaming
from layer_surgery.errors import LayerSurgeryError, OutputError


def fill(directory: Path, weights: bytes) -> None:
    """Write what a result has."""
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "tokenizer.json").write_text("{}")
    files = {name: vars(record) for name, record in list_files(directory).items()}
    (directory / "surgery.json").write_text(json.dumps({"files": files}))


def write(output: Path, weights: bytes = b"new", *, overwrite: bool = False, meanwhile: object = None) -> list[str]:
    """Write a result, and call `meanwhile` before it is renamed into place; return the notes."""
    notes: list[str] = []
    with staged_directory(output, overwrite=overwrite, note=notes.append) as staging:
        fill(staging, weights)
        if callable(meanwhile):
            meanwhile()
    return notes


def weights_in(output: Path) -> bytes:
    assert not_ours(output) is None
    return (output / "model.safetensors").read_bytes()


@pytest.fixture(params=["renameat2", "without"], ids=["with renameat2", "without renameat2"])
def output(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name for a result, on a system that can rename without replacing, and exchange, and on one that cannot."""
    if request.param == "without":
        monkeypatch.setattr(renaming, "_function", lambda: None)
    elif renaming._function() is None:
        pytest.skip("this system has no renameat2")
    return tmp_path / "output"


@pytest.fixture
def old(output: Path) -> Path:
    """Return the name of a result that is there already."""
    write(output, b"old")
    return output


# What comes to the output while a run works


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "dangling link"])
def test_what_appears_at_the_output_is_not_replaced_and_the_result_is_kept(output: Path, kind: str) -> None:
    def appear() -> None:
        if kind == "file":
            output.write_text("mine")
        elif kind == "dangling link":
            output.symlink_to("nowhere")
        else:
            output.mkdir()
            if kind == "directory":
                (output / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"has appeared while this run worked.*made is in .*output-2\.$"):
        write(output, meanwhile=appear)
    assert weights_in(output.with_name("output-2")) == b"new"
    shutil.rmtree(output.with_name("output-2"))
    before = listing(output.parent)
    assert before.keys() <= {"output", "output/mine.txt"}
    assert output.is_symlink() or "output" in before


@pytest.mark.parametrize("name", ["notes.txt", "vocabulary.md", "adapter_model.safetensors", "sub/model.safetensors"])
def test_with_overwrite_too_what_someone_puts_there_meanwhile_is_not_lost(old: Path, name: str) -> None:
    def appear() -> None:
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text("mine")

    with pytest.raises(OutputError, match=rf"holds {name} while this run worked"):
        write(old, overwrite=True, meanwhile=appear)
    assert (old / name).read_text() == "mine"
    assert (old / "model.safetensors").read_bytes() == b"old"
    assert weights_in(old.with_name("output-2")) == b"new"


def test_with_overwrite_an_old_result_that_goes_away_meanwhile_is_no_obstacle(old: Path) -> None:
    write(old, overwrite=True, meanwhile=lambda: shutil.rmtree(old))
    assert weights_in(old) == b"new"


def test_the_old_result_is_replaced_and_nothing_else_is_left(old: Path) -> None:
    assert write(old, overwrite=True) == []
    assert weights_in(old) == b"new"
    assert [entry.name for entry in old.parent.iterdir()] == ["output"]


def test_two_runs_on_one_output_are_not_let_in_together(output: Path) -> None:
    with staged_directory(output, overwrite=False) as staging:
        fill(staging, b"first")
        with pytest.raises(OutputError, match="another run is working on --output"):
            write(output)
    assert weights_in(output) == b"first"


def test_two_runs_that_no_lock_and_no_process_id_tells_apart_keep_both_results(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers on a volume that has no locks."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    for module in (locks, own):
        monkeypatch.setattr(module, "try_lock", lambda _descriptor: None)
    with pytest.raises(OutputError, match="output-2"):
        write(output, b"first", meanwhile=lambda: write(output, b"second"))
    assert weights_in(output) == b"second"
    assert weights_in(output.with_name("output-2")) == b"first"


def test_a_random_name_that_is_taken_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    with own.own_directory(tmp_path, "x-"), pytest.raises(FileExistsError), own.own_directory(tmp_path, "x-"):
        pass


# What is ours


@pytest.mark.parametrize(
    "name",
    ["vocab_notes.txt", "adapter_model.safetensors", "additional_chat_templates/mine.jinja", "LICENSE.mine", ".hidden"],
)
def test_what_only_looks_like_ours_is_not_replaced(old: Path, name: str) -> None:
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine")
    before = listing(old)
    with pytest.raises(OutputError, match=f"holds {name}"):
        write(old, overwrite=True)
    assert listing(old) == before


def test_a_link_to_what_is_ours_elsewhere_is_not_followed(old: Path, tmp_path: Path) -> None:
    shutil.move(old / "tokenizer.json", tmp_path / "elsewhere.json")
    (old / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputError, match=r"holds tokenizer\.json, which is no file of its own"):
        write(old, overwrite=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real result."""
    folder = tmp_path_factory.mktemp("result")
    path = saved_model(folder / "model")
    layer_surgery.compress(path, folder / "output", layers=[1], keep=0, refit=False, eval_data=None)
    return folder / "output"


def older(path: Path) -> None:
    """Make a result one of release 0.2, which had no list and no seal on its page."""
    report = json.loads((path / "surgery.json").read_text())
    del report["files"]
    (path / "surgery.json").write_text(json.dumps(report))
    (path / "report.html").write_text("a page without a seal")


EDITS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nothing": (lambda path: None, None),
    "a card": (lambda path: (path / "README.md").write_text("My model"), r"holds README\.md, which was changed"),
    "a page": (lambda path: (path / "report.html").write_text("My page"), r"holds report\.html, which was changed"),
    "a template": (
        lambda path: (path / "chat_template.jinja").write_text("mine"),
        r"holds chat_template\.jinja, which was changed",
    ),
    "weights": (
        lambda path: (path / "model.safetensors").write_bytes(b"mine"),
        r"holds model\.safetensors, which was changed",
    ),
    "the report, made again": (lambda path: layer_surgery.report(path), None),
    "the report, damaged": (lambda path: (path / "surgery.json").write_text("{"), r"surgery\.json that cannot be read"),
    "a list that leads out": (
        lambda path: (path / "surgery.json").write_text('{"files": {"../model/config.json": {}}}'),
        r"surgery\.json that cannot be read",
    ),
    "0.2": (older, None),
    "0.2 and notes": (lambda path: (older(path), (path / "vocab.md").touch()), r"holds vocab\.md"),
    "0.2 and other weights": (
        lambda path: (older(path), (path / "pytorch_lora_weights.safetensors").touch()),
        r"holds pytorch_lora_weights\.safetensors",
    ),
    "0.2 and an edited card": (
        lambda path: (older(path), (path / "README.md").write_text("My model")),
        r"holds README\.md, which was changed",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_result_is_replaced_only_where_nobody_has_changed_it(result: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(result, tmp_path / "output")
    edit, refusal = EDITS[name]
    edit(path)
    before = listing(path)
    if refusal is None:
        write(path, overwrite=True)
        assert weights_in(path) == b"new"
        return
    with pytest.raises(OutputError, match=refusal):
        write(path, overwrite=True)
    assert listing(path) == before


def test_an_old_result_that_cannot_be_removed_is_kept_in_sight(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_directory: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output_module, "remove_result", fail)
    (note,) = write(old, overwrite=True)
    assert "could not be removed (Permission denied)" in note and "output-old-2" in note
    assert weights_in(old) == b"new"
    assert weights_in(old.with_name("output-old-2")) == b"old"
    assert len(list(old.parent.iterdir())) == 2


# What a killed run has left


def killed(work: Callable[[], object], place: str, monkeypatch: pytest.MonkeyPatch, call: int = 1) -> None:
    """Do some work in a process of its own that is killed at a call of a function of `output`."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(output_module, place), [0]

        def die(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        monkeypatch.setattr(output_module, place, die)
        work()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed there"


def test_what_a_killed_run_has_left_is_removed_by_the_next_one(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(lambda: write(output, b"lost"), "sync_tree", monkeypatch)
    assert {entry.name.partition("-")[0] for entry in output.parent.iterdir()} == {".output.partial", ".output.lock"}
    (note,) = write(output)
    assert note.startswith("removed .output.partial-")
    assert weights_in(output) == b"new"
    assert [entry.name for entry in output.parent.iterdir()] == ["output"]


def test_what_a_living_run_works_in_is_not_removed(tmp_path: Path) -> None:
    with own.own_directory(tmp_path, "x-") as path:
        assert own.remove_dead(tmp_path, "x-") == []
        assert path.is_dir()


def test_a_kill_in_the_middle_of_replacing_loses_neither_name_nor_result(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the old result has just left its place."""
    killed(lambda: write(old, b"newer", overwrite=True), "_may_not_go", monkeypatch)
    notes: list[str] = []
    with pytest.raises(ValueError, match="stop"), staged_directory(old, overwrite=True, note=notes.append):
        raise ValueError("stop")
    at_once = renaming._function() is not None
    assert weights_in(old) == (b"newer" if at_once else b"old")
    assert at_once or "it is back in its place" in notes[0]
    assert [entry.name for entry in old.parent.iterdir()] == ["output"]


def test_files_that_someone_put_into_a_result_before_a_kill_are_kept(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(lambda: write(old, overwrite=True), "_remove_old", monkeypatch)
    (left,) = old.parent.glob(".output.partial-*/old")
    (left / "mine.txt").write_text("mine")
    notes = write(old, overwrite=True)
    assert "output-old-2" in notes[0]
    assert (old.with_name("output-old-2") / "mine.txt").read_text() == "mine"


# Failures and signals at the last step


@pytest.mark.parametrize("place", ["sync_tree", "exchange", "sync"])
def test_a_failing_disk_leaves_the_old_result_or_the_new_one(
    old: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output_module, place, fail)
    with pytest.raises(LayerSurgeryError, match=r"failed.*Input/output error"):
        write(old, overwrite=True)
    assert weights_in(old) in (b"old", b"new")
    assert [entry.name for entry in old.parent.iterdir()] == ["output"]


def test_an_old_result_that_cannot_even_be_put_back_is_put_back_by_the_next_run(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(output_module, "exchange", lambda *_: False)
        patch.setattr(output_module, "rename_new", fail)
        with pytest.raises(LayerSurgeryError, match=r"nor put back .*Input/output error.*the next run"):
            write(old, overwrite=True)
    notes = write(old, overwrite=True)
    assert "it is back in its place" in notes[0]
    assert weights_in(old) == b"new"
    assert [entry.name for entry in old.parent.iterdir()] == ["output"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["rename", "clean-up"])
def test_signals_wait_while_names_change_and_while_it_is_cleaned_up(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: int, place: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    module, name = (output_module, "rename_new") if place == "rename" else (shutil, "rmtree")
    original = getattr(module, name)

    def signalled(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, signalled)
    handler = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(output)
    finally:
        signal.signal(number, handler)
    assert weights_in(output) == b"new"
    assert [entry.name for entry in output.parent.iterdir()] == ["output"]
