"""The teacher's answers on disk: read by sequence, gone on with, refused when they do not fit, and full disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import listing
from torch import Tensor

from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.healing.losses import TeacherLogits
from layer_surgery.healing.teacher import cache as module
from layer_surgery.healing.teacher.cache import CODEBOOK_FILE, HEADER_FILE, TeacherCache, TeacherIdentity
from layer_surgery.healing.teacher.form import RecordForm

V = 50
#: Tokens that carry loss; one sequence has none.
TOKENS = [30, 41, 0, 25, 60, 12, 33]
FORM = RecordForm(bytes_per_token=48, most=V)
IDENTITY = TeacherIdentity(teacher_sha256="a" * 64, tokenizer_sha256="b" * 64, data_sha256="c" * 64)
LOGITS = 2 * torch.randn(sum(TOKENS), V, generator=torch.Generator().manual_seed(0))
FIRSTS = np.cumsum([0, *TOKENS])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards of 60 tokens: the sequences 0-1, 2-4 and 5-6."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 60)


def opened(directory: Path, identity: TeacherIdentity = IDENTITY, **options: Any) -> TeacherCache:
    arguments = {"tokens": TOKENS, "vocabulary": V, "form": FORM} | options
    return TeacherCache.open(directory, identity, **arguments)


def pieces(first: int = 0, size: int = 17) -> Iterator[Tensor]:
    """Yield the logits from a sequence on, in pieces that end anywhere."""
    yield from LOGITS[FIRSTS[first] :].split(size)


def captured(directory: Path, **options: Any) -> TeacherCache:
    cache = opened(directory, **options)
    cache.capture(pieces())
    return cache


def assert_same(one: TeacherLogits, other: TeacherLogits) -> None:
    assert one.ids is not None and other.ids is not None
    width = min(one.ids.shape[1], other.ids.shape[1])
    assert torch.equal(one.ids[:, :width], other.ids[:, :width])
    assert torch.equal(one.log_probs[:, :width], other.log_probs[:, :width])
    assert (one.tail is None and other.tail is None) or torch.equal(one.tail, other.tail)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [FORM, RecordForm(form="sampled", samples=20)])
def test_records_are_read_by_sequence_in_any_order(tmp_path: Path, form: RecordForm) -> None:
    cache = captured(tmp_path / "cache", form=form)
    assert cache.complete and sorted(listing(tmp_path / "cache")) == [
        CODEBOOK_FILE,
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
        HEADER_FILE,
    ]
    records = opened(tmp_path / "cache", form=form).records()
    whole = records.read(range(len(TOKENS)))
    assert len(whole.log_probs) == sum(TOKENS) and whole.kind == form.form
    wanted = [4, 0, 2, 4, 6]
    rows = torch.cat([torch.arange(FIRSTS[each], FIRSTS[each + 1]) for each in wanted])
    some = records.read(torch.tensor(wanted))
    assert whole.ids is not None
    tail = None if whole.tail is None else whole.tail[rows]
    assert_same(some, TeacherLogits(whole.log_probs[rows], whole.ids[rows], tail))
    # They are what they were made of: the likeliest token is the teacher's, where one is much likelier than the next.
    top = LOGITS.softmax(dim=1).topk(2, dim=1)
    clear = top.values[:, 0] > 1.5 * top.values[:, 1]
    likeliest = whole.ids.gather(1, whole.log_probs.argmax(dim=1, keepdim=True)).squeeze(1)
    assert clear.sum() > 30 and (likeliest == top.indices[:, 0])[clear].float().mean() > 0.9
    assert len(records.read([2]).log_probs) == 0
    with pytest.raises(IndexError, match="sequence 7 of 7"):
        records.read([7])


def test_pieces_do_not_count(tmp_path: Path) -> None:
    captured(tmp_path / "one")
    other = opened(tmp_path / "other")
    other.capture([LOGITS])
    for file in ("shard-00000.safetensors", "shard-00002.safetensors", CODEBOOK_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_an_interrupted_capture_goes_on_behind_its_finished_shards(tmp_path: Path) -> None:
    captured(tmp_path / "whole")

    def interrupted() -> Iterator[Tensor]:
        yield LOGITS[:160]  # sequences 0 to 4 end at 156
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "cache").capture(interrupted())
    cache = opened(tmp_path / "cache")
    assert not cache.complete and cache.next_sequence == 5
    with pytest.raises(ValueError, match="5 of 7 sequences are captured"):
        cache.records()
    cache.capture(pieces(first=5))
    assert_same(
        opened(tmp_path / "cache").records().read(range(7)), opened(tmp_path / "whole").records().read(range(7))
    )


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, written = module.save_file, list[str]()

    def full(arrays: Any, path: Path, about: dict[str, str]) -> None:
        written.append(path.name)
        if len(written) == 3:  # the codebook, a shard, and half of the next
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(arrays, path, about)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(LayerSurgeryError) as caught:
        captured(tmp_path)
    assert str(caught.value) == (
        f"--teacher-cache {tmp_path} cannot be written (No space left on device); is the disk full? The 2 of 7 "
        "sequences that are captured stay: make room and run the same command again."
    )
    assert caught.value.exit_code == 1 and len(list(tmp_path.iterdir())) == 3
    cache = opened(tmp_path)
    assert cache.next_sequence == 2
    cache.capture(pieces(first=2))
    assert opened(tmp_path).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_sha256": "d" * 64}, "another teacher"),
        ({"tokenizer_sha256": "d" * 64}, "another tokenizer"),
        ({"data_sha256": "d" * 64}, "other data"),
        ({"chat_template_sha256": "d" * 64}, "another chat template"),
        ({"code_sha256": "d" * 64}, "another release of layer-surgery"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    assert set(asdict(IDENTITY)) == set(module._WHAT_DIFFERS)
    captured(tmp_path)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, replace(IDENTITY, **changes))
    assert str(caught.value) == (
        f"--teacher-cache {tmp_path} was captured with {message}; give another directory, or delete this one to "
        "capture again."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": replace(FORM, bytes_per_token=60)}, "bytes_per_token 48 where 60 is asked for"),
        ({"form": replace(FORM, temperature=2.0)}, "temperature 1.0 where 2.0 is asked for"),
        ({"form": RecordForm(form="sampled")}, "form top_k where sampled is asked for"),
        ({"tokens": TOKENS[:-1]}, "other data"),
        ({"vocabulary": V + 1}, "other data"),
    ],
)
def test_a_cache_of_another_form_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    captured(tmp_path)
    with pytest.raises(UserError, match=f"was captured with {message}; give another directory"):
        opened(tmp_path, **options)


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and no teacher cache; give another directory"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"cannot be made \(.*\); give another"):
        opened(tmp_path / "thesis.txt" / "cache")
    assert list(listing(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize(("file", "again"), [("shard-00001.safetensors", 2), (CODEBOOK_FILE, 0)])
@pytest.mark.parametrize("missing", [True, False])
def test_damaged_files_are_captured_again(tmp_path: Path, file: str, again: int, missing: bool) -> None:
    expected = captured(tmp_path).records().read(range(7))
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).unlink() if missing else (tmp_path / file).write_bytes(content)
    notes: list[str] = []
    cache = opened(tmp_path, note=notes.append)
    assert cache.next_sequence == again
    assert len(notes) == 1 and file in notes[0] and "captured again" in notes[0]
    cache.capture(pieces(first=again))
    assert_same(opened(tmp_path).records().read(range(7)), expected)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    captured(tmp_path)
    header = json.loads((tmp_path / HEADER_FILE).read_text())
    header["record"]["shards"][0]["stop"] = 1
    for text in (json.dumps(header), "{", "[]"):
        (tmp_path / HEADER_FILE).write_text(text)
        with pytest.raises(UserError, match=r"has a damaged teacher\.json .*; delete the directory to capture again"):
            opened(tmp_path)


def test_a_header_that_says_something_odd_is_refused_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Their checksums are right: who has changed them knew how."""
    captured(tmp_path)
    whole = json.loads((tmp_path / HEADER_FILE).read_text())["record"]
    shard = whole["shards"][0]
    for change in (
        {"shards": [shard | {"stop": "x"}]},
        {"shards": [shard | {"first": 1}]},
        {"shards": [shard, shard]},
        {"shards": 5},
        {"sequences": None},
        {"form": whole["form"] | {"more": 1}},
        {"vocabulary": [[]] * 2},
    ):
        record = whole | change
        text = json.dumps({"record": record, "sha256": module._record_sha256(record)})
        (tmp_path / HEADER_FILE).write_text(text)
        with pytest.raises(UserError, match=r"has a damaged teacher\.json|was captured with"):
            opened(tmp_path)
    (tmp_path / HEADER_FILE).write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"has a damaged teacher\.json"):
        opened(tmp_path)
    (tmp_path / HEADER_FILE).unlink()
    os.mkfifo(tmp_path / HEADER_FILE)
    with pytest.raises(UserError, match="no regular file"):
        opened(tmp_path)


def test_what_a_killed_capture_has_left_is_no_obstacle(tmp_path: Path) -> None:
    """Killed before the first header: a codebook is there, and what a library was writing."""
    captured(tmp_path)
    (tmp_path / HEADER_FILE).unlink()
    left = tmp_path / f"{module.STAGING}0123456789abcdef"
    left.mkdir()
    (left / ".tmpAbCdEf").write_bytes(b"half")
    cache = opened(tmp_path)
    assert cache.next_sequence == 0 and not left.exists()
    cache.capture(pieces())
    assert opened(tmp_path).complete


def test_what_is_kept_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = list[str](), os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(f"to {to}"), replace(self, to)))
    captured(tmp_path)
    renamed = [number for number, what in enumerate(done) if what.startswith("to ")]
    assert len(renamed) == 7  # the codebook, three shards, and after each of these the header
    for number in renamed:
        assert Path(done[number - 1]).parent != tmp_path or "partial" in done[number - 1]
        assert done[number - 1] != str(tmp_path) and done[number + 1] == str(tmp_path)


def test_a_capture_of_another_run_is_not_read_by_the_codebook_of_this_one(tmp_path: Path) -> None:
    """Another run has found the codebook damaged, and captures again with other logits."""
    records = captured(tmp_path).records()
    for path in tmp_path.iterdir():
        path.unlink()
    opened(tmp_path).capture(iter((0.9 * LOGITS).split(17)))
    with pytest.raises(LayerSurgeryError, match="another run has captured it again since"):
        records.read([0])


def test_a_file_that_goes_away_while_training_is_one_sentence(tmp_path: Path) -> None:
    records = captured(tmp_path).records()
    (tmp_path / "shard-00001.safetensors").unlink()
    records.read([0, 6])
    with pytest.raises(LayerSurgeryError, match=r"--teacher-cache: .*shard-00001.safetensors cannot be read"):
        records.read([3])


def test_too_few_and_too_many_logits_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 tokens of the teacher are missing"):
        opened(tmp_path / "few").capture([LOGITS[:-1]])
    with pytest.raises(ValueError, match="too many logits"):
        opened(tmp_path / "many").capture([LOGITS, LOGITS[:1]])
    with pytest.raises(ValueError, match="logits over 49 tokens, and the vocabulary has 50"):
        opened(tmp_path / "narrow").capture([LOGITS[:, :-1]])
