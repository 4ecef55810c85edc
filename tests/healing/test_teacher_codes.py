"""Records of a teacher as bits and back; how near they are to what they record, and in how many bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from layer_surgery.errors import UserError
from layer_surgery.healing.losses import TeacherLogits, TokenLogits
from layer_surgery.healing.losses.divergences import forward_kl
from layer_surgery.healing.teacher.bits import PADDING, Windows, pack
from layer_surgery.healing.teacher.codebook import Codebook, RecordReader
from layer_surgery.healing.teacher.entries import CLASSES, MOST_LEVEL, Entries, EntryCode, EntryReader
from layer_surgery.healing.teacher.form import Observed, RecordForm, observe
from layer_surgery.healing.teacher.prefix_code import LONGEST, PrefixCodes

V = 400


def logits(n: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    """Return logits [n, V] that fall with the id, as common tokens come first, of tokens that are more or less sure."""
    generator = torch.Generator().manual_seed(seed)
    noise, sharpness = torch.randn(n, V, generator=generator), torch.rand(n, 1, generator=generator) + 0.5
    return scale * sharpness * (noise - torch.arange(1, V + 1).log())


def recorded(x: Tensor, form: RecordForm, book: Codebook | None = None) -> tuple[TeacherLogits, int]:
    """Return logits as they are read from their records, and the bytes of these."""
    observed = observe(x, form, 0)
    book = book or Codebook.fitted(observed, form, V)
    coded = book.encode(observed)
    ends = np.cumsum(coded.bits)
    return RecordReader(book, form.temperature).read(coded.stream, ends - coded.bits, ends, coded.tails), coded.nbytes


def dense(teacher: TeacherLogits) -> Tensor:
    """Return the probabilities [n, V] of the entries of a record."""
    assert teacher.ids is not None
    p = torch.zeros(len(teacher.ids), V)
    return p.scatter_add_(1, teacher.ids.clamp_min(0), teacher.log_probs.exp())


# -- bits and codes


def test_bits_are_read_where_they_were_written() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 58, 500)
    codes = random.integers(0, 1 << 57, 500).astype(np.uint64) >> (57 - lengths).astype(np.uint64)
    stream = pack(codes, lengths)
    assert len(stream) == -(-int(lengths.sum()) // 8)
    text = "".join(f"{int(code):0{length}b}" for code, length in zip(codes, lengths, strict=True))
    assert "".join(f"{byte:08b}" for byte in stream)[: len(text)] == text
    windows = Windows(np.concatenate([stream, np.zeros(PADDING, np.uint8)]))
    starts = np.cumsum(lengths) - lengths
    assert (windows.at(starts) >> (64 - lengths).astype(np.uint64) == codes).all()
    assert len(pack(np.zeros(0, np.uint64), np.zeros(0, np.int64))) == 0


def test_code_words_are_prefix_free_complete_and_near_the_entropy() -> None:
    counts = np.stack([np.array([900, 300, 200, 100, 40, 10, 1, 0]), np.zeros(8, int), 2 ** np.arange(8)])
    codes = PrefixCodes.fitted(counts)
    for words, lengths, row in zip(codes.words(), codes.lengths, counts, strict=True):
        texts = [f"{word:0{length}b}" for word, length in zip(words, lengths, strict=True)]
        assert not any(b.startswith(a) for a, b in itertools.permutations(texts, 2))
        assert sum(2.0 ** -len(text) for text in texts) == 1
        if row.sum():
            share = row[row > 0] / row.sum()
            entropy = -(share * np.log2(share)).sum()
            assert entropy <= (row * lengths).sum() / row.sum() < entropy + 0.1


def test_no_code_word_is_too_long_for_the_table() -> None:
    codes = PrefixCodes.fitted(np.array([[2**number for number in range(40)]]))
    assert codes.lengths.max() == LONGEST and np.sum(2.0 ** -codes.lengths.astype(float)) == 1


def random_entries(vocabulary: int, n: int, seed: int) -> tuple[Entries, np.ndarray]:
    random = np.random.default_rng(seed)
    ranks = [np.unique((vocabulary ** random.random(random.integers(0, 40))).astype(int) - 1) for _ in range(n)]
    counts = np.array([len(each) for each in ranks])
    levels = np.minimum((1 / random.random(counts.sum())).astype(int), MOST_LEVEL)
    return Entries(counts, np.concatenate(ranks), levels), random.integers(0, CLASSES, n)


@pytest.mark.parametrize("vocabulary", [2, 300, 262_144])
def test_entries_come_back(vocabulary: int) -> None:
    entries, classes = random_entries(vocabulary, 300, seed=1)
    entries.levels[:12] = [1, 2, 8, 9, 10, 16, 17, 18, 32, 33, MOST_LEVEL - 1, MOST_LEVEL]
    code = EntryCode.fitted(*random_entries(vocabulary, 50, seed=2), vocabulary)  # of others: every entry has a code
    stream, bits = code.encode(entries, classes)
    ends = np.cumsum(bits)
    found = EntryReader(code).decode(stream, ends - bits, ends, classes)
    for name in ("counts", "ranks", "levels"):
        assert (getattr(found, name) == getattr(entries, name)).all()
    # Any tokens in any order, without the others.
    some = np.array([7, 299, 7, 0])
    found = EntryReader(code).decode(stream, (ends - bits)[some], ends[some], classes[some])
    expected = np.split(entries.ranks, np.cumsum(entries.counts))
    assert (found.ranks == np.concatenate([expected[token] for token in some])).all()


def test_bits_that_are_no_entries_are_refused() -> None:
    entries, classes = random_entries(300, 50, seed=1)
    code = EntryCode.fitted(entries, classes, 300)
    stream, bits = code.encode(entries, classes)
    ends = np.cumsum(bits)
    with pytest.raises(ValueError, match="do not end where they should"):
        EntryReader(code).decode(stream, ends - bits, ends - 1, classes)


# -- records


def test_a_record_is_a_distribution_near_the_teachers() -> None:
    x = logits(600)
    teacher, nbytes = recorded(x, RecordForm(bytes_per_token=64))
    p = x.softmax(dim=1)
    assert teacher.tail is not None and teacher.ids is not None
    torch.testing.assert_close(teacher.log_probs.exp().sum(dim=1) + teacher.tail.exp(), torch.ones(600))
    kept = dense(teacher) > 0
    assert (dense(teacher) - p)[kept].abs().max() < 0.02
    torch.testing.assert_close(teacher.tail.exp(), (p * ~kept).sum(dim=1), rtol=0, atol=0.02)
    assert 0.8 * 64 < nbytes / 600 < 1.1 * 64


def test_more_bytes_are_nearer() -> None:
    x, student = logits(300), logits(300, seed=1)
    labels = torch.zeros(300, dtype=torch.int64)
    exact = forward_kl(TokenLogits(student, TeacherLogits(x.log_softmax(dim=1)), labels))
    errors = []
    for wanted in (16, 32, 64, 256):
        teacher, _ = recorded(x, RecordForm(bytes_per_token=wanted, most=V))
        errors.append(float((forward_kl(TokenLogits(student, teacher, labels)) - exact).abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 10


def test_tokens_to_come_take_the_bytes_asked_for() -> None:
    form = RecordForm(bytes_per_token=40)
    book = Codebook.fitted(observe(logits(2000), form, 0), form, V)
    _, nbytes = recorded(logits(1000, seed=5), form, book)
    assert 0.85 * 40 < nbytes / 1000 < 1.1 * 40


def test_a_sure_token_takes_few_bytes_and_an_unsure_one_many() -> None:
    sure, unsure = torch.zeros(200, V), torch.zeros(200, V)
    sure[:, 3] = 30.0
    unsure[:, :50] = 5.0
    form = RecordForm(bytes_per_token=40)
    teacher, _ = recorded(torch.stack([sure, unsure], dim=1).flatten(0, 1), form)
    assert teacher.ids is not None
    counts = (teacher.ids >= 0).sum(dim=1)
    assert (counts[::2] == 1).all() and (counts[1::2] == 50).all()


def test_a_temperature_is_that_of_the_record() -> None:
    x = logits(300)
    teacher, _ = recorded(x, RecordForm(temperature=3.0, bytes_per_token=200, most=V))
    assert teacher.temperature == 3.0
    kept = dense(teacher) > 0
    assert (dense(teacher) - (x / 3).softmax(dim=1))[kept].abs().max() < 0.01


def test_a_sample_has_every_frequency_within_one_draw() -> None:
    x, form = logits(300), RecordForm(form="sampled", samples=20)
    teacher, nbytes = recorded(x, form)
    assert teacher.kind == "sampled"
    torch.testing.assert_close(teacher.log_probs.exp().sum(dim=1), torch.ones(300))
    assert (dense(teacher) - x.softmax(dim=1)).abs().max() < 1 / 20 + 1e-6
    assert nbytes < 40 * 300


def test_a_sample_is_right_on_average_and_the_same_in_any_pieces() -> None:
    x = logits(1).repeat(4000, 1)
    form = RecordForm(form="sampled", samples=4)
    teacher, _ = recorded(x, form)
    torch.testing.assert_close(dense(teacher).mean(dim=0), x[0].softmax(dim=0), rtol=0, atol=0.01)
    whole = observe(x[:50], form, 7)
    pieces = Observed.joined([observe(x[:13], form, 7), observe(x[13:50], form, 20)])
    assert (whole.ids == pieces.ids).all() and (whole.values == pieces.values).all()
    other = observe(x[:50], RecordForm(form="sampled", samples=4, seed=1), 7)
    assert len(other.ids) != len(whole.ids) or (other.ids != whole.ids).any()


def test_a_codebook_comes_back_from_its_arrays() -> None:
    x, form = logits(200), RecordForm(bytes_per_token=64)
    book = Codebook.fitted(observe(x, form, 0), form, V)
    one, _ = recorded(x, form, book)
    other, _ = recorded(x, form, Codebook.from_arrays(book.arrays()))
    assert torch.equal(one.log_probs, other.log_probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes_per_token": 2}, "bytes_per_token of the teacher's records is 2; allowed: 8 to 4096."),
        ({"most": 0}, "most of the teacher's records is 0; allowed: 1 to 1024."),
        ({"samples": 0}, "samples of the teacher's records is 0; allowed: 1 to 8192."),
        ({"temperature": 0.0}, "temperature of the teacher's records is 0.0; allowed: above 0."),
    ],
)
def test_a_form_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RecordForm(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message
