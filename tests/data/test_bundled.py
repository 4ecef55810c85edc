"""The bundled text: found, whole, checked, and within its rules."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from tiny_tokenizer import tiny_tokenizer

from layer_surgery.data import Text, bundled, load_documents
from layer_surgery.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "calibration_data"


def manifest_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_manifest", REAL / "build_manifest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = manifest_script()


def write_manifest(directory: Path) -> None:
    """A manifest with made-up token counts, so that no tokenizer is needed."""
    parts = {
        part: {
            "documents": [
                {"file": path.name, "tokens": 7, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in sorted((directory / part).glob("*.txt"))
            ]
        }
        for part in SCRIPT.PARTS
    }
    directory.joinpath("MANIFEST.json").write_text(json.dumps({"tokenizer": None, "parts": parts}))


def make_texts(directory: Path, calibration_words: int = 32_000, evaluation_words: int = 8_000) -> Path:
    """Two files in each part, every word of its own."""
    for part, words in (("calibration", calibration_words), ("evaluation", evaluation_words)):
        (directory / part).mkdir(parents=True)
        for name, size in (("b-two.txt", words // 2), ("a-one.txt", words - words // 2)):
            text = " ".join(f"{part}{name[0]}{n}" for n in range(size))
            (directory / part / f"{part}-{name}").write_text(text + "\n")
    write_manifest(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts of the right size, with a manifest."""
    return make_texts(tmp_path / "data")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with bundled text inside, as in a wheel, in the place of the real one."""
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "site" / "layer_surgery")
    return make_texts(tmp_path / "site" / "layer_surgery" / "calibration_data", 40, 10)


# The text that is there


def test_the_real_text_is_whole_and_the_parts_are_disjoint() -> None:
    texts = {}
    for part in ("calibration", "evaluation"):
        data = load_documents("bundled", part=part)
        assert (data.name, data.kind) == ("bundled", "text")
        texts[part] = [document.text for document in data.documents if isinstance(document, Text)]
        assert len(texts[part]) == len(list((REAL / part).glob("*.txt")))
    assert not set(texts["calibration"]) & set(texts["evaluation"])
    words = {part: sum(len(text.split()) for text in texts[part]) for part in texts}
    total = sum(words.values())
    assert total >= 40_000
    assert 0.75 <= words["calibration"] / total <= 0.85


def test_the_real_manifest_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT.main(["--check"]) == 0, capsys.readouterr().err


def test_the_real_manifest_says_what_it_must() -> None:
    text = (REAL / "MANIFEST.json").read_text()
    manifest = json.loads(text)
    assert manifest["schema_version"] == 1 and manifest["licence"] == "Apache-2.0"
    assert "/" not in text, "no paths"
    documents = [document for part in manifest["parts"].values() for document in part["documents"]]
    for document in documents:
        assert set(document) == {"file", "kind", "words", "tokens", "sha256"}
        assert document["tokens"] >= document["words"] > 0
        assert document["file"].startswith(document["kind"] + "-")
        assert re.fullmatch("[0-9a-f]{64}", document["sha256"])
    assert manifest["totals"]["tokens"] == sum(document["tokens"] for document in documents)


# Finding and verifying


def test_text_inside_the_package_comes_first(package: Path) -> None:
    beside = make_texts(package.parent.parent / "calibration_data", 4, 2)
    assert bundled.bundled_directory() == package
    shutil.rmtree(package)
    assert bundled.bundled_directory() == beside
    shutil.rmtree(beside)
    with pytest.raises(DataError, match=r"the bundled text is not there .*pass a file of your own"):
        load_documents("bundled", part="calibration")


def test_documents_come_in_order_without_final_newline(package: Path) -> None:
    data = load_documents("bundled", part="evaluation")
    files = [package / "evaluation" / f"evaluation-{name}.txt" for name in ("a-one", "b-two")]
    assert data.documents == [Text(path.read_text().removesuffix("\n")) for path in files]
    assert data.origin == "the evaluation part of the bundled text, 2 documents"


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_a_damaged_missing_or_unlisted_file_is_named(package: Path, part: str) -> None:
    path = package / part / f"{part}-b-two.txt"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match=rf"{part}-b-two.txt differs from its SHA-256"):
        load_documents("bundled", part=part)  # type: ignore[arg-type]
    path.unlink()
    with pytest.raises(DataError, match=rf"{part}-b-two.txt is missing"):
        load_documents("bundled", part=part)  # type: ignore[arg-type]
    (package / part / "a-new.txt").write_text("x")
    with pytest.raises(DataError, match=r"a-new.txt is not listed"):
        load_documents("bundled", part=part)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": {}}', '{"parts": {"calibration": {"documents": [1]}}}'])
def test_a_damaged_manifest_is_named(package: Path, content: str) -> None:
    (package / "MANIFEST.json").write_text(content)
    with pytest.raises(DataError, match=r"MANIFEST.json cannot be read"):
        load_documents("bundled", part="calibration")


def test_an_empty_part(package: Path) -> None:
    for path in (package / "evaluation").glob("*.txt"):
        path.unlink()
    write_manifest(package)
    with pytest.raises(DataError, match="lists no evaluation documents"):
        load_documents("bundled", part="evaluation")


def test_columns_do_not_apply() -> None:
    with pytest.raises(DataError, match="bundled has no columns"):
        load_documents("bundled", column="text", part="calibration")


# The script


def run(directory: Path, *arguments: str) -> int:
    return int(SCRIPT.main(["--directory", str(directory), *arguments]))


def test_written_manifest_passes_its_check(data: Path) -> None:
    assert run(data, "--check") == 1, "the made-up manifest is not what would be written"
    assert run(data) == 0
    assert run(data, "--check") == 0
    manifest = json.loads((data / "MANIFEST.json").read_text())
    part = manifest["parts"]["calibration"]
    assert (part["words"], part["tokens"], part["number"]) == (32_000, 14, 2)
    assert manifest["totals"] == {"words": 40_000, "tokens": 28}
    assert [document["kind"] for document in part["documents"]] == ["calibration", "calibration"]


def test_a_changed_text_needs_a_tokenizer_and_fails_the_check(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data) == 0
    before = (data / "MANIFEST.json").read_text()
    path = data / "calibration" / "calibration-a-one.txt"
    path.write_text(path.read_text() + "more\n")
    assert run(data, "--check") == 1
    assert "out of date" in capsys.readouterr().err
    assert run(data) == 1
    assert "no token count is known for calibration-a-one.txt" in capsys.readouterr().err
    assert (data / "MANIFEST.json").read_text() == before


def test_tokens_are_counted_with_the_given_tokenizer(data: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run(data, str(tmp_path / "tokenizer")) == 0
    manifest = json.loads((data / "MANIFEST.json").read_text())
    text = (data / "evaluation" / "evaluation-a-one.txt").read_text().removesuffix("\n")
    expected = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    assert manifest["parts"]["evaluation"]["documents"][0]["tokens"] == expected
    digest = hashlib.sha256((tmp_path / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer"] == {"tokenizer_json_sha256": digest}
    assert run(data, "--check") == 0


@pytest.mark.parametrize(
    ("calibration", "evaluation", "expected"),
    [
        (31_999, 8_000, "39,999 words in all"),
        (34_400, 5_600, "calibration has 86.0% of the words"),
        (29_600, 10_400, "calibration has 74.0% of the words"),
    ],
)
def test_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], calibration: int, evaluation: int, expected: str
) -> None:
    directory = make_texts(tmp_path / "data", calibration, evaluation)
    assert run(directory) == 1
    assert run(directory, "--check") == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tail", "expected"),
    [
        ("evaluation-copy.txt", "", "a document stands in both parts (sha256"),
        ("calibration-a-one.txt", "tail", "a document stands in both parts (file calibration-a-one.txt)"),
        ("evaluation-copy.txt", "\n\ntail", "a paragraph stands in both parts: calibration-a-one.txt and evaluation-c"),
    ],
)
def test_overlap_of_the_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tail: str, expected: str
) -> None:
    directory = make_texts(tmp_path / "data", 34_000, 9_000)
    source = directory / "calibration" / "calibration-a-one.txt"
    source.write_text(" ".join(f"w{n}" for n in range(30)))
    (directory / "evaluation" / name).write_text(source.read_text() + tail)
    write_manifest(directory)
    run(directory)
    assert run(directory, "--check") == 1
    assert expected in capsys.readouterr().err
