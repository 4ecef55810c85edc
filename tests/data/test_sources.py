"""Sources: files of every format, hub data sets (the hub replaced), and everything that is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from layer_surgery.data import Chat, Example, LoadedData, Text, known_sources, load_documents
from layer_surgery.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


@pytest.fixture(params=sorted(WRITERS))
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict]], Path]:
    """Writes rows to a file, in each format in turn."""
    return lambda rows: WRITERS[request.param](tmp_path / f"data{request.param}", rows)


def load(source: object, column: str | None = None) -> LoadedData:
    return load_documents(str(source), column=column, part="calibration")


def refused_if(path: Path, content: str | bytes, *parts: str) -> None:
    """Check that a file with this content is refused."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(path, *parts)


def refused(source: object, *parts: str, column: str | None = None) -> str:
    """Check that loading is refused in one line that holds all `parts`; return it."""
    with pytest.raises(DataError) as caught:
        load(source, column)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# Tables


def test_text_column(write: Callable) -> None:
    path = write([{"text": 'one, "two"\r\nthree', "n": "1"}, {"text": " Zürich\u2028x ", "n": "2"}])
    assert load(path) == LoadedData(str(path), [Text('one, "two"\r\nthree'), Text(" Zürich\u2028x ")], "text")


def test_chosen_column_wins(write: Callable) -> None:
    data = load(write([{"prompt": "p", "answer": "a", "body": "b"}]), column="body")
    assert (data.kind, data.documents) == ("text", [Text("b")])


@pytest.mark.parametrize("prompt", ["prompt", "question"])
@pytest.mark.parametrize("answer", ["answer", "completion", "response"])
def test_prompt_and_answer_columns(write: Callable, prompt: str, answer: str) -> None:
    data = load(write([{"text": "no", answer: "a", prompt: "q"}, {"text": "no", answer: "b", prompt: "r"}]))
    assert (data.kind, data.documents) == ("example", [Example("q", "a"), Example("r", "b")])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_messages_column(tmp_path: Path, suffix: str) -> None:
    data = load(WRITERS[suffix](tmp_path / f"chat{suffix}", [{"prompt": "alone", "messages": MESSAGES}]))
    assert (data.kind, data.documents) == ("chat", [Chat(MESSAGES)])


def test_null_fields_of_a_message_are_left_out(tmp_path: Path) -> None:
    messages = [MESSAGES[0] | {"name": "Ann"}, MESSAGES[1] | {"name": None}]
    data = load(write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}]))
    assert data.documents == [Chat([MESSAGES[0] | {"name": "Ann"}, MESSAGES[1]])]


def test_unknown_columns_are_listed(write: Callable) -> None:
    refused(
        write([{"title": "x", "body": "y"}]), "title, body", "prompt (or question)", "messages", "text", "--text-column"
    )


def test_missing_chosen_column_is_named_with_the_nearest(write: Callable) -> None:
    refused(write([{"title": "x", "body": "y"}]), "'bodi'", "Did you mean 'body'?", "title, body", column="bodi")


def test_empty_field_names_file_and_row(write: Callable) -> None:
    path = write([{"text": "one"}, {"text": " \n "}])
    place = "line 2" if path.suffix == ".jsonl" else "row 2"
    refused(path, f"{path}, {place}: the field 'text' is empty")
    refused(write([{"prompt": "", "answer": "a"}]), "the field 'prompt' is empty")
    refused(write([{"prompt": "p", "answer": ""}]), "the field 'answer' is empty")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_missing_and_non_string_fields(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    write = WRITERS[suffix]
    refused(write(path, [{"text": "one"}, {"text": None}]), "2: the field 'text' is missing")
    refused(write(path, [{"text": 5}]), "1: the field 'text' must be text, but is of type int")
    refused(write(path, [{"n": 5, "text": "x"}]), "must be text, but is of type int", column="n")
    refused(write(path, [{"prompt": "p", "answer": "a"}, {"prompt": "p"}]), "2: the field 'answer' is missing")


def test_no_rows(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": "\n\n", "b.json": "[]", "c.csv": "", "d.csv": "text\n", "e.jsonl": ""}.items():
        refused_if(tmp_path / name, content, name, "has no rows")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "f.parquet")
    refused(tmp_path / "f.parquet", "has no rows")


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    refused_if(tmp_path / "a.jsonl", '{"text": "x\\ud800"}', "line 1", "surrogate")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_not_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    refused_if(path, "text\ncafé".encode("latin-1"), str(path), "UTF-8", "byte 8 is 0xe9")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_signature_of_utf8_is_no_part_of_a_table(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", [{"text": "x"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).documents == [Text("x")]


# Single formats


@pytest.mark.parametrize("name", ["a.txt", "A.TXT"])
@pytest.mark.parametrize("text", ["  one\r\n\r\ntwo\n\n", "\ufeffx"], ids=["line ends", "signature"])
def test_txt_is_one_text_exactly(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert load(path) == LoadedData(str(path), [Text(text)], "text")


def test_blank_txt_and_column_of_txt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    refused_if(path, " \n", str(path), "is empty")
    path.write_text("x")
    refused(path, "has no columns", column="text")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', ("a.jsonl, line 3: invalid JSON",)),
        ("a.jsonl", '{"text": "x"}\n[1]\n', ("line 2: must be an object", "list")),
        ("a.json", '[{"text": "x"},\n{"text"}]', ("invalid JSON", "line 2", ".jsonl")),
        ("a.json", '{"text": "x"}', ("must hold a list of objects", "dict")),
        ("a.json", '[{"text": "x"}, 3]', ("row 2: must be an object", "int")),
        ("a.json", "[" * 200_000, ("JSON that cannot be read",)),
        ("a.json", " ", ("is empty",)),
        ("a.csv", "prompt,answer\na,b\na,b,c\n", ("row 2: 3 fields, but the header names 2",)),
        ("a.csv", "prompt,answer\na,b\na\n", ("row 2: the field 'answer' is missing",)),
        ("a.csv", 'text\n"a"b\n', ("line 2: invalid CSV",)),
        ("a.csv", "text,text\na,b\n", ("twice",)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_damaged_table_is_named_with_the_place(
    tmp_path: Path, name: str, content: str, parts: tuple[str, ...]
) -> None:
    refused_if(tmp_path / name, content, str(tmp_path / name), *parts)


def test_csv_with_a_long_field_and_restored_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert load(write_csv(tmp_path / "a.csv", [{"text": long}])).documents == [Text(long)]
    assert csv.field_size_limit() == before


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    refused_if(path, b"not parquet at all", str(path), "cannot be read as Parquet")
    write_parquet(path, [{"text": f"row {n}" * 20} for n in range(200)])
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    refused_if(path, bytes(content), "the Parquet data after row 0 is damaged")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", "must be a list"),
        ([], "must be a list of at least one"),
        (["hi"], "message 1: must have the fields role and content"),
        ([{"role": "user"}], "message 1: the field 'content' is missing"),
        ([{"content": "x"}], "message 1: the field 'role' is missing"),
        ([MESSAGES[0], {"role": "assistant", "content": ""}], "message 2: the field 'content' is empty"),
        ([MESSAGES[0], MESSAGES[1] | {"calls": [1]}], "message 2: the field 'calls' must be text"),
        ([MESSAGES[0]], "needs a message of role 'assistant'"),
        ([MESSAGES[1], MESSAGES[0]], "after one of another role"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: object, expected: str) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": MESSAGES}, {"messages": messages}])
    refused(path, f"{path}, line 2", expected)


# Paths and names


@pytest.mark.parametrize("source", ["none.jsonl", "some/none.txt", "./none", "/none/here", "a/b/c", "notes.docx"])
def test_missing_file(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(source, f"there is no file {source}")


def test_unknown_suffix_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.docx").write_text("x")
    refused(tmp_path / "a.docx", "a.docx", ".txt, .jsonl, .json, .csv, .parquet")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refused("owner/name", "owner/name is a folder")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert load("~/a.txt").documents == [Text("x")]


def test_unknown_name_suggests_the_nearest() -> None:
    refused("wikitxt2", "unknown data set 'wikitxt2'", "Did you mean 'wikitext2'?", "bundled, c4, gsm8k, wikitext2")
    refused("bundeld@train", "unknown data set 'bundeld'", "Did you mean 'bundled'?")
    assert known_sources() == ["bundled", "c4", "gsm8k", "wikitext2"]


@pytest.mark.parametrize("source", ["", "a/b#", "a/b@", "#x", "a b/c", "x" * 5000 + "/y z"])
def test_malformed_source(source: str) -> None:
    refused(source, "OWNER/NAME[#CONFIG][@SPLIT]")


def test_unknown_part() -> None:
    with pytest.raises(DataError, match="unknown part 'eval'"):
        load_documents("bundled", part="eval")  # type: ignore[arg-type]


# The hub, replaced


class FakeHub:
    """Answers for the hub: one repository, its configs and splits, and the rows of every split."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs = ["default"]
        self.splits = ["train", "test"]
        self.rows: list[dict] = [{"text": "one"}, {"text": "two"}]
        self.calls: list[tuple[tuple, dict]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda repository: self.configs)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repository, config: self.splits)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, *args: object, **kwargs: object) -> object:
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        if kwargs.get("streaming"):
            return datasets.IterableDataset.from_generator(lambda: iter(self.rows))
        return datasets.Dataset.from_list(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub(monkeypatch)


def test_hub_repository(hub: FakeHub) -> None:
    data = load("owner/name.v2")
    assert (data.name, data.kind, data.documents) == ("owner/name.v2", "text", [Text("one"), Text("two")])
    assert hub.calls == [(("owner/name.v2", "default"), {"split": "train"})]
    assert data.origin == "owner/name.v2, config default, split train"


def test_hub_parts_configs_and_splits(hub: FakeHub) -> None:
    hub.configs, hub.splits = ["big", "small"], ["train", "validation"]
    load_documents("o/n#small", part="evaluation")
    load_documents("o/n#big@train[:10]", part="evaluation")
    assert hub.calls == [(("o/n", "small"), {"split": "validation"}), (("o/n", "big"), {"split": "train[:10]"})]
    hub.splits = ["test", "validation"]
    load_documents("o/n#big", part="evaluation")
    assert hub.calls[-1] == (("o/n", "big"), {"split": "test"})
    refused("o/n#big", "no split train for calibration", "@SPLIT", "test, validation")
    refused("o/n", "several configs", "o/n#CONFIG", "big, small")
    refused("o/n#smal", "unknown config of o/n 'smal'", "Did you mean 'small'?")
    refused("o/n#big@tets", "unknown split of o/n 'tets'", "Did you mean 'test'?")


def test_hub_columns_follow_the_rules_for_tables(hub: FakeHub) -> None:
    hub.rows = [{"question": "q", "answer": "a", "other": "x"}]
    assert load("gsm8k").documents == [Example("q", "a")]
    assert hub.calls == [(("openai/gsm8k", "main"), {"split": "train"})]
    assert load("o/n", column="other").documents == [Text("x")]
    refused("o/n", "question, answer, other", column="text")
    hub.rows = [{"text": "x"}, {"text": ""}]
    refused("o/n", "o/n, row 2: the field 'text' is empty")


@pytest.mark.parametrize("source", ["wikitext2", "Salesforce/wikitext#wikitext-2-raw-v1@test"])
def test_wikitext_is_one_text_with_its_empty_lines(hub: FakeHub, source: str) -> None:
    hub.configs = ["wikitext-2-raw-v1", "other"]
    hub.rows = [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": "b\n"}]
    data = load_documents(source, part="evaluation")
    assert data.documents == [Text("\n\n = A = \n\n\n\n\nb\n")]
    assert hub.calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert data.name == source


def test_known_name_with_another_split(hub: FakeHub) -> None:
    hub.configs, hub.splits = ["main", "socratic"], ["train", "test"]
    hub.rows = [{"question": "q", "answer": "a"}]
    load("gsm8k@test")
    load("gsm8k#socratic")
    assert [call[0][1] + " " + call[1]["split"] for call in hub.calls] == ["main test", "socratic train"]


def test_c4_streams_a_stated_number_of_documents(hub: FakeHub) -> None:
    hub.rows = [{"text": f"page {n}", "url": "u"} for n in range(5001)]
    data = load("c4")
    assert len(data.documents) == 5000 and data.documents[-1] == Text("page 4999")
    assert data.origin == "allenai/c4, first 5,000 documents of en/c4-train.00000-of-01024.json.gz"
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert hub.calls[0][1] == {"data_files": files, "split": "train", "streaming": True}
    assert "c4-validation" in load_documents("c4", part="evaluation").origin
    refused("c4#en", "takes no #CONFIG")
    refused("c4@test", "unknown split of allenai/c4 'test'", "train, validation")


def test_no_code_of_a_data_set_is_trusted(hub: FakeHub) -> None:
    hub.rows = [{"text": "x", "question": "q", "answer": "a"}]
    for source in ("o/n", "c4", "gsm8k", "wikitext2"):
        load(source)
    assert hub.calls and all("trust_remote_code" not in call[1] for call in hub.calls)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Couldn't reach\nthe Hub"), ValueError(""), FileNotFoundError("Dataset o/n doesn't exist.")],
)
def test_failure_of_the_hub(hub: FakeHub, error: Exception) -> None:
    hub.error = error
    message = refused("o/n", "cannot read data set 'o/n' from the hub", type(error).__name__, "pass a local .txt")
    assert message.count(".)") == 0


def test_known_name_wins_over_a_file(hub: FakeHub) -> None:
    Path("c4").write_text("x")
    load("c4")
    assert hub.calls
    refused("./c4", "the suffix must be one of")
