"""Packing: windows of text, rows of examples, masks, and everything that is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from layer_surgery.data import Chat, Example, LoadedData, Text, check_vocabulary, pack_calibration, pack_evaluation
from layer_surgery.data.encoding import leading_bos
from layer_surgery.data.packing import packed_tokens
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, DataError

TEXTS = [" ".join(str(n) for n in range(first, first + 100)) for first in (0, 1000, 2000)]
TEXT = LoadedData("numbers.txt", [Text(text) for text in TEXTS], "text")
SUMS = [Example(f"{n} and {n}?", f"{2 * n}!") for n in range(40)]
EXAMPLES = LoadedData("sums.csv", [*SUMS], "example")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids straight from the backend, beside the code under test."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def stream_of(tokenizer: PreTrainedTokenizerFast, texts: list[str] = TEXTS) -> list[int]:
    ids = ids_of(tokenizer, texts[0])
    for text in texts[1:]:
        ids += ids_of(tokenizer, "\n\n") + ids_of(tokenizer, text)
    return ids


def runs(tokens: PackedTokens, row: int) -> list[list[int]]:
    """Ids of each unbroken run of positions that carry loss."""
    found: list[list[int]] = []
    previous = False
    for token, loss in zip(tokens.token_ids[row].tolist(), tokens.loss_mask[row].tolist(), strict=True):
        if loss and not previous:
            found.append([])
        if loss:
            found[-1].append(token)
        previous = loss
    return found


# Texts, calibration


@pytest.mark.parametrize("adds_bos", [False, True])
def test_calibration_windows_are_disjoint_pieces_of_the_stream(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    stream, body = stream_of(tokenizer), 16 - adds_bos
    packed = pack_calibration(TEXT, tokenizer, samples=len(stream) // body, sequence_length=16, seed=3)
    cut = [stream[start : start + body] for start in range(0, len(stream) - body + 1, body)]
    windows = packed.token_ids[:, int(adds_bos) :].tolist()
    assert sorted(windows) == sorted(cut)
    assert windows != cut, "the chosen order is kept, not sorted"
    assert packed.token_ids.shape == (len(cut), 16) and packed.token_ids.dtype == torch.int64
    assert packed.tokens_available == len(stream)
    assert packed.name == "numbers.txt"
    assert packed.valid.all() and not packed.loss_mask[:, 0].any() and packed.loss_mask[:, 1:].all()
    if adds_bos:
        assert (packed.token_ids[:, 0] == tokenizer.bos_token_id).all()


def test_seed_decides_the_windows() -> None:
    tokenizer = tiny_tokenizer()
    first, again, other = (pack_calibration(TEXT, tokenizer, samples=8, sequence_length=16, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.token_ids, again.token_ids) and first.sha256 == again.sha256
    assert not torch.equal(first.token_ids, other.token_ids) and first.sha256 != other.sha256


def test_too_few_windows_are_refused_with_the_numbers() -> None:
    tokenizer = tiny_tokenizer()
    tokens = len(stream_of(tokenizer))
    count = tokens // 64
    with pytest.raises(DataError) as caught:
        pack_calibration(TEXT, tokenizer, samples=count + 1, sequence_length=64, seed=0)
    found = f"numbers.txt has {tokens:,} tokens, which make {count} windows at --sequence-length 64, fewer than"
    assert str(caught.value).startswith(f"{found} --samples {count + 1}; lower --samples to at most {count}, or")
    assert pack_calibration(TEXT, tokenizer, samples=count, sequence_length=64, seed=0).sequences == count
    # None at all: zero samples are not advised.
    with pytest.raises(DataError, match=r"0 windows .* lower --sequence-length, or pass more data"):
        pack_calibration(TEXT, tokenizer, samples=1, sequence_length=100_000, seed=0)


def test_long_texts_cause_no_length_warning(caplog: pytest.LogCaptureFixture) -> None:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # the command line, where it was run before, has lowered it
    transformers.logging.enable_propagation()
    try:
        tokenizer = tiny_tokenizer(model_max_length=8)
        pack_calibration(TEXT, tokenizer, samples=2, sequence_length=16, seed=0)
        pack_evaluation(EXAMPLES, tokenizer, sequence_length=64)
        assert not caplog.records
        tokenizer(TEXTS[0])
        assert caplog.records, "the warning exists, and would be seen"
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(verbosity)


def test_truncation_set_in_the_tokenizer_file_does_not_cut_the_text() -> None:
    tokenizer = tiny_tokenizer()
    whole = len(stream_of(tokenizer))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    assert pack_calibration(TEXT, tokenizer, samples=2, sequence_length=16, seed=0).tokens_available == whole


def test_many_documents_are_joined_in_order() -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"{n}." for n in range(600)]  # more than one batch for the tokenizer
    packed = pack_evaluation(LoadedData("x", [Text(t) for t in texts], "text"), tokenizer, sequence_length=50)
    assert packed.token_ids[packed.valid].tolist() == stream_of(tokenizer, texts)


# BOS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"adds_bos": True}, True),
        ({"bos": None}, False),
        ({"bos": "a"}, False),  # an ordinary text may begin with it
        ({"adds_eos": True, "bos": "<eos>"}, False),  # one token for both, put behind the text only
    ],
)
def test_leading_bos_is_found_only_where_the_tokenizer_adds_it(options: dict, expected: bool) -> None:
    tokenizer = tiny_tokenizer(**options)
    assert leading_bos(tokenizer) == (tokenizer.bos_token_id if expected else None)


# Texts, evaluation


@pytest.mark.parametrize("length", [2, 7, 16, 33, 5000])
def test_with_bos_every_text_token_is_predicted_exactly_once(length: int) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    packed = pack_evaluation(TEXT, tokenizer, sequence_length=length, max_windows=None)
    assert packed.token_ids[packed.loss_mask].tolist() == stream_of(tokenizer)
    assert (packed.token_ids[:, 0] == tokenizer.bos_token_id).all()
    assert packed.tokens_available == packed.predicted_tokens


@pytest.mark.parametrize("length", [6, 16, 33, 5000])
def test_without_bos_every_text_token_is_in_exactly_one_window(length: int) -> None:
    tokenizer = tiny_tokenizer()
    stream = stream_of(tokenizer)
    assert len(stream) % length != 1
    packed = pack_evaluation(TEXT, tokenizer, sequence_length=length)
    assert packed.token_ids[packed.valid].tolist() == stream
    assert packed.predicted_tokens == len(stream) - packed.sequences
    assert not packed.loss_mask[:, 0].any()


def test_the_last_window_is_padded_on_the_right() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    packed = pack_evaluation(TEXT, tokenizer, sequence_length=16)
    rest = len(stream_of(tokenizer)) % 15
    assert rest
    assert packed.valid[:-1].all()
    assert packed.valid[-1].tolist() == [True] * (rest + 1) + [False] * (15 - rest)
    assert (packed.token_ids[-1, rest + 1 :] == tokenizer.pad_token_id).all()
    assert not (packed.loss_mask & ~packed.valid).any()


def test_a_last_window_of_one_token_is_kept_only_with_bos_and_a_full_one_is_not_padded() -> None:
    text = LoadedData("x", [Text("0123456789"[:9])], "text")
    without = pack_evaluation(text, tiny_tokenizer(), sequence_length=4)
    assert without.sequences == 2 and without.valid.all() and without.tokens_available == 9
    with_bos = pack_evaluation(text, tiny_tokenizer(adds_bos=True), sequence_length=5)
    assert with_bos.sequences == 3 and with_bos.valid[-1].sum() == 2
    full = pack_evaluation(LoadedData("x", [Text("01234567")], "text"), tiny_tokenizer(), sequence_length=4)
    assert full.sequences == 2 and full.valid.all()


def test_max_windows_takes_the_first() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    everything = pack_evaluation(TEXT, tokenizer, sequence_length=16)
    some = pack_evaluation(TEXT, tokenizer, sequence_length=16, max_windows=3)
    assert torch.equal(some.token_ids, everything.token_ids[:3]) and some.valid.all()
    assert some.tokens_available == everything.tokens_available
    more = pack_evaluation(TEXT, tokenizer, sequence_length=16, max_windows=10_000)
    assert more.sha256 == everything.sha256


def test_evaluation_text_too_short_to_predict_anything() -> None:
    with pytest.raises(DataError, match=r"x has 1 tokens, too few"):
        pack_evaluation(LoadedData("x", [Text("7")], "text"), tiny_tokenizer(), sequence_length=4)


# Examples


@pytest.mark.parametrize("adds_bos", [False, True])
def test_only_answers_carry_loss(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    packed = pack_evaluation(EXAMPLES, tokenizer, sequence_length=48)
    answers = [tokenizer.decode(run) for row in range(packed.sequences) for run in runs(packed, row)]
    assert answers == [f" {example.answer}<eos>" for example in SUMS]
    start = "<bos>" if adds_bos else ""
    texts = [tokenizer.decode(ids[valid]) for ids, valid in zip(packed.token_ids, packed.valid, strict=True)]
    assert "".join(texts) == "".join(f"{start}{e.prompt} {e.answer}<eos>" for e in SUMS)
    assert packed.sequences < len(SUMS), "several examples share a row"
    assert packed.tokens_available == packed.valid.sum()


def test_an_answer_without_eos_token_ends_itself() -> None:
    tokenizer = tiny_tokenizer(eos=None)
    packed = pack_evaluation(replace(EXAMPLES, documents=[SUMS[0]]), tokenizer, sequence_length=48)
    assert [tokenizer.decode(run) for run in runs(packed, 0)] == [" 0!"]


@pytest.mark.parametrize(
    ("prompt", "answer", "before", "counted"),
    [
        ("Q:", "the", "Q:", " the"),  # a space is put in
        ("Q: ", "the", "Q:", " the"),  # the prompt's space belongs to the answer
        ("Q:", " the", "Q:", " the"),
        ("Q:\n", "the", "Q:\n", "the"),
        ("Q:", "\nthe", "Q:", "\nthe"),
        ("Q:\n", "\n\nthe", "Q:\n", "\n\nthe"),  # "\n\n" is one token, but must not be across the joint
    ],
)
@pytest.mark.parametrize("marks_beginning", [False, True])
def test_white_space_at_the_joint(prompt: str, answer: str, before: str, counted: str, marks_beginning: bool) -> None:
    tokenizer = tiny_tokenizer(marks_beginning=marks_beginning, eos=None)
    packed = pack_evaluation(LoadedData("x", [Example(prompt, answer)], "example"), tokenizer, sequence_length=32)
    decoded = tokenizer.decode(packed.token_ids[packed.loss_mask])
    if marks_beginning and answer == "\n\nthe":  # tokenised alone, so marked once more
        decoded = decoded.removeprefix("▁")
    assert decoded == counted
    mark = "▁" if marks_beginning else ""
    assert tokenizer.decode(packed.token_ids[packed.valid & ~packed.loss_mask]) == mark + before


def test_the_joint_of_line_ends_would_be_straddled() -> None:
    tokenizer = tiny_tokenizer()
    whole, head = ids_of(tokenizer, "Q:\n\n\nthe"), ids_of(tokenizer, "Q:\n")
    assert whole[: len(head)] != head, "so the case above tests what it says"


def test_the_first_token_of_an_example_never_carries_loss() -> None:
    tokenizer = tiny_tokenizer(eos=None)
    data = LoadedData("x", [Example("", "12"), Example("", "34")], "example")
    packed = pack_evaluation(data, tokenizer, sequence_length=8)
    found = [tokenizer.decode(run) for run in runs(packed, 0)]
    assert found == ["12", "34"], "the spaces before them are predicted by none"


def test_rows_are_filled_greedily_with_whole_examples() -> None:
    tokenizer = tiny_tokenizer()
    sizes = [len(ids_of(tokenizer, f"{e.prompt} {e.answer}")) + 1 for e in SUMS]
    rows = [0]
    for size in sizes:
        if rows[-1] + size > 40:
            rows.append(0)
        rows[-1] += size
    packed = pack_evaluation(EXAMPLES, tokenizer, sequence_length=40)
    assert packed.valid.sum(dim=1).tolist() == rows
    assert (packed.token_ids[~packed.valid] == tokenizer.pad_token_id).all()
    assert torch.equal(packed.valid, packed.valid.cummin(dim=1).values), "padding is on the right"


@pytest.mark.parametrize(("options", "pad"), [({}, 0), ({"pad": None}, 2), ({"pad": None, "eos": None}, 0)])
def test_padding_token(options: dict, pad: int) -> None:
    packed = pack_evaluation(EXAMPLES, tiny_tokenizer(**options), sequence_length=40)
    assert (packed.token_ids[~packed.valid] == pad).all() and not packed.valid.all()


def test_calibration_examples_are_shuffled_by_seed() -> None:
    tokenizer = tiny_tokenizer()
    rows = [pack_calibration(EXAMPLES, tokenizer, samples=4, sequence_length=40, seed=seed) for seed in (1, 1, 2)]
    in_order = pack_evaluation(EXAMPLES, tokenizer, sequence_length=40)
    assert rows[0].sha256 == rows[1].sha256 != rows[2].sha256
    assert not torch.equal(rows[0].token_ids, in_order.token_ids[:4])
    answers = {f" {example.answer}<eos>" for example in SUMS}
    found = [tokenizer.decode(run) for row in range(4) for run in runs(rows[0], row)]
    assert set(found) <= answers and len(set(found)) == len(found)
    assert rows[0].sequences == 4 and rows[0].tokens_available == in_order.tokens_available


def test_too_few_rows_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    for seed in range(3):
        with pytest.raises(DataError, match=r"sums.csv has .* tokens, which make \d+ rows of whole example") as caught:
            pack_calibration(EXAMPLES, tokenizer, samples=40, sequence_length=40, seed=seed)
        count = int(str(caught.value).split("which make ")[1].split()[0])
        assert f"lower --samples to at most {count}" in str(caught.value)
        pack_calibration(EXAMPLES, tokenizer, samples=count, sequence_length=40, seed=seed)


@pytest.mark.parametrize("calibration", [False, True])
def test_an_example_that_is_too_long_is_refused(calibration: bool) -> None:
    tokenizer = tiny_tokenizer()
    documents = [SUMS[0], Example("0" * 50, "1"), SUMS[1]]
    data = LoadedData("long.csv", documents, "example")
    length = 50 + len(ids_of(tokenizer, " 1")) + 1
    expected = rf"long.csv, example 2 has {length} tokens, more than --sequence-length {length - 1} \(1 of 3"

    def pack(sequence_length: int) -> PackedTokens:
        if calibration:
            return pack_calibration(data, tokenizer, samples=1, sequence_length=sequence_length, seed=0)
        return pack_evaluation(data, tokenizer, sequence_length=sequence_length)

    with pytest.raises(DataError, match=expected + f".*raise --sequence-length to at least {length}"):
        pack(length - 1)
    assert pack(length).sequences


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([], "x has no examples"),
        ([Text("t")], "x, example 1: is a text among examples"),
        ([Example("q\n", "")], "x, example 1: the answer has no tokens"),
    ],
    ids=str,
)
def test_examples_without_an_answer_to_learn_are_refused(documents: list, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        pack_evaluation(LoadedData("x", documents, "example"), tiny_tokenizer(eos=None), sequence_length=8)


# Chats


def chat(*turns: tuple[str, str]) -> LoadedData:
    return LoadedData("chats.jsonl", [Chat([{"role": role, "content": content} for role, content in turns])], "chat")


def test_every_assistant_turn_carries_loss_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE, adds_bos=True)
    data = chat(("system", "be"), ("user", "hi"), ("assistant", "the fox"), ("user", "so"), ("assistant", "the dog"))
    packed = pack_evaluation(data, tokenizer, sequence_length=96)
    assert [tokenizer.decode(run) for run in runs(packed, 0)] == ["the fox<|end|>\n", "the dog<|end|>\n"]
    (document,) = data.documents
    assert isinstance(document, Chat)
    rendered = tokenizer.apply_chat_template(document.messages, tokenize=False)
    assert tokenizer.decode(packed.token_ids[0][packed.valid[0]]) == rendered, "the template decides on BOS"


def test_a_turn_after_the_last_answer_is_kept_without_loss() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    packed = pack_evaluation(chat(("user", "a"), ("assistant", "b"), ("user", "c")), tokenizer, sequence_length=64)
    assert [tokenizer.decode(run) for run in runs(packed, 0)] == ["b<|end|>\n"]
    assert tokenizer.decode(packed.token_ids[0][packed.valid[0]]).endswith("<|start|>user\nc<|end|>\n")


def test_chats_share_rows_in_calibration() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    documents = [chat(("user", f"{n}"), ("assistant", f"{n}{n}")).documents[0] for n in range(10, 22)]
    packed = pack_calibration(LoadedData("c", documents, "chat"), tokenizer, samples=3, sequence_length=96, seed=0)
    answers = [tokenizer.decode(run) for row in range(3) for run in runs(packed, row)]
    assert len(answers) > 3
    assert set(answers) <= {f"{n}{n}<|end|>\n" for n in range(10, 22)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "chats.jsonl, chat 1: this tokenizer has no chat template"),
        ("{{ messages | length }}" + CHAT_TEMPLATE, "chat template changes earlier turns when message 2 is added"),
        ("{{ raise_exception('no user') }}" + CHAT_TEMPLATE, r"does not accept the messages \(no user\)"),
    ],
)
def test_a_template_that_is_missing_or_does_not_fit_is_refused(template: str | None, expected: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template) if template else tiny_tokenizer()
    with pytest.raises(DataError, match=expected):
        pack_evaluation(chat(("user", "a"), ("assistant", "b")), tokenizer, sequence_length=64)


# Arguments, vocabulary, hash


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("samples", 0, "at least 1"),
        ("samples", -3, "at least 1"),
        ("sequence_length", 1, "at least 2"),
        ("seed", -1, "at least 0 and at most"),
        ("seed", 2**63, "at least 0 and at most"),
        ("max_windows", 0, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, value: int, allowed: str) -> None:
    option = argument.replace("_", "-")
    expected = rf"{argument} \(--{option}\) is {value}, but must be {allowed}"
    if argument in ("sequence_length", "max_windows"):
        with pytest.raises(DataError, match=expected):
            pack_evaluation(TEXT, tiny_tokenizer(), **{"sequence_length": 8} | {argument: value})
    if argument != "max_windows":
        options = {"samples": 2, "sequence_length": 16, "seed": 0} | {argument: value}
        with pytest.raises(DataError, match=expected):
            pack_calibration(TEXT, tiny_tokenizer(), **options)


def test_vocabulary_must_cover_every_token() -> None:
    packed = pack_evaluation(TEXT, tiny_tokenizer(), sequence_length=16)
    largest = int(packed.token_ids.max())
    check_vocabulary(packed, largest + 1)
    with pytest.raises(CheckpointError, match=rf"does not fit the model: .*token id {largest}.* {largest} rows"):
        check_vocabulary(packed, largest)


def test_hash_depends_on_every_part() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[False, True, True, False]])
    every = torch.ones(1, 4, dtype=torch.bool)
    variants = [
        (ids, mask, every),
        (ids + 1, mask, every),
        (ids, ~mask, every),
        (ids, mask, ~mask),
        (ids.view(2, 2), mask.view(2, 2), every.view(2, 2)),
    ]
    hashes = [packed_tokens("x", *variant, available=4).sha256 for variant in variants]
    assert len(set(hashes)) == len(variants) and all(len(digest) == 64 for digest in hashes)
    assert packed_tokens("y", *variants[0], available=9).sha256 == hashes[0]
