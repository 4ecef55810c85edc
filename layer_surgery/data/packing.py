"""Documents as packed token sequences of one length, with the mask of tokens that carry loss.

Shapes: N sequences, S tokens each (`sequence_length`).
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import LoadedData
from layer_surgery.data.encoding import EncodedExample, encode_examples, encode_texts, leading_bos
from layer_surgery.data.labelled import pack_labelled
from layer_surgery.data.masking import pack_masked, text_windows
from layer_surgery.data.objective import NEXT_TOKEN, Objective
from layer_surgery.data.passages import pack_passages, passages
from layer_surgery.data.tokens import PackedTokens, packed_tokens
from layer_surgery.errors import CheckpointError, DataError

_LARGEST_SEED = 2**63 - 1


class TooFewSequencesError(DataError):
    """A source makes fewer sequences than are to be drawn from it."""

    def __init__(self, data: LoadedData, tokens: int, count: int, samples: int, sequence_length: int) -> None:
        labelled = data.kind in ("labelled", "tagged")
        unit = "windows" if data.kind == "text" else "examples" if labelled else f"rows of whole {data.kind}s"
        lower = f"lower --samples to at most {count}, or lower" if count else "lower"
        self.count = count
        """Number of sequences that there are."""
        self.found = (
            f"{data.name} has {count:,} {unit}"
            if labelled
            else f"{data.name} has {tokens:,} tokens, which make {count:,} {unit} at --sequence-length "
            f"{sequence_length}"
        )
        """The first half of the message, for those who know better than `--samples` what to do."""
        lower = f"lower --samples to at most {count}" if labelled else f"{lower} --sequence-length"
        super().__init__(f"{self.found}, fewer than --samples {samples}; {lower}, or pass more data.")


def pack_calibration(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    objective: Objective = NEXT_TOKEN,
    alone: bool = False,
    overlap: int | None = None,
) -> PackedTokens:
    """Pack `samples` sequences of `sequence_length` tokens, chosen by `seed`; the CPU generator is the function's own.

    Texts: joined by a blank line and cut into non-overlapping windows, of which `samples` are drawn without
    replacement. If the tokenizer puts a BOS token before texts by itself, each window is BOS and S - 1 text tokens.
    All tokens but those at position 0 carry loss.

    Examples and chats: only answers carry loss (and the token that ends them). Whole examples are packed in shuffled
    order: a row takes the next example while it fits, and is padded on the right; with `alone` each row has one example
    only, so that no token sees another example. `samples` counts rows. Each
    prompt/answer example begins with BOS (if the tokenizer adds it) and ends with EOS (if there is one).

    For a masked language model, windows are those of `text_windows`, and which tokens are masked is the seed's; for
    classifiers each labelled example is a sequence (see `pack_labelled`), or with an `overlap` each window of one; for
    embedding models each passage is (`passages`).

    Raises `DataError`: an argument out of range; fewer sequences than `samples` (`TooFewSequencesError`); an example
    longer than `sequence_length`.
    """
    _require("samples", samples, 1)
    _require("sequence_length", sequence_length, 2)
    _require("seed", seed, 0, _LARGEST_SEED)
    generator = torch.Generator().manual_seed(seed)
    if objective.labelled:
        return _draw_labelled(data, tokenizer, objective, samples, sequence_length, overlap, generator)
    if objective.problem == "embedding":
        return _draw_passages(data, tokenizer, objective, samples, sequence_length, generator)
    if objective.problem == "masked_token":
        return _draw_masked(data, tokenizer, objective, samples, sequence_length, generator)
    if data.kind == "text":
        return _draw_windows(data, tokenizer, samples, sequence_length, generator)
    return _draw_rows(data, tokenizer, samples, sequence_length, alone, generator)


def _draw_labelled(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    samples: int,
    sequence_length: int,
    overlap: int | None,
    generator: torch.Generator,
) -> PackedTokens:
    every = range(len(data.documents))
    size: dict[str, Any] = {"sequence_length": sequence_length, "overlap": overlap}
    windows = None if overlap is None else pack_labelled(data, tokenizer, objective, chosen=every, **size)
    count = len(every) if windows is None else windows.sequences
    drawn = _drawn(count, samples, generator, TooFewSequencesError(data, 0, count, samples, sequence_length))
    if windows is not None:
        return windows.select(drawn)
    return pack_labelled(data, tokenizer, objective, chosen=drawn.tolist(), **size)


def _draw_passages(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    samples: int,
    sequence_length: int,
    generator: torch.Generator,
) -> PackedTokens:
    found = passages(data, tokenizer, objective, sequence_length=sequence_length)
    tokens = sum(len(each.ids) for each in found)
    too_few = TooFewSequencesError(data, tokens, len(found), samples, sequence_length)
    drawn = _drawn(len(found), samples, generator, too_few)
    return pack_passages(data, tokenizer, objective, found, drawn.tolist())


def _draw_masked(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    samples: int,
    sequence_length: int,
    generator: torch.Generator,
) -> PackedTokens:
    ids, text, available = text_windows(data, tokenizer, sequence_length=sequence_length)
    full = int(text[:1].sum())
    whole = (text.sum(dim=1) == full).nonzero().flatten()
    too_few = TooFewSequencesError(data, available, len(whole), samples, sequence_length)
    rows = whole[_drawn(len(whole), samples, generator, too_few)]
    return pack_masked(data, tokenizer, objective, (ids[rows], text[rows], available), generator)


def _draw_windows(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    generator: torch.Generator,
) -> PackedTokens:
    stream, bos = encode_texts(tokenizer, data), leading_bos(tokenizer)
    body = sequence_length - (bos is not None)
    count = len(stream) // body
    too_few = TooFewSequencesError(data, len(stream), count, samples, sequence_length)
    drawn = _drawn(count, samples, generator, too_few)
    return _packed_windows(data.name, stream[: count * body].view(count, body)[drawn], bos, len(stream))


def _draw_rows(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    alone: bool,
    generator: torch.Generator,
) -> PackedTokens:
    examples = encode_examples(tokenizer, data)
    _require_fit(data, examples, sequence_length)
    order = torch.randperm(len(examples), generator=generator).tolist()
    shuffled = (examples[i] for i in order)
    filled = ([example] for example in shuffled) if alone else _fill_rows(shuffled, sequence_length)
    rows = list(islice(filled, samples))
    available = sum(map(len, examples))
    if len(rows) < samples:
        raise TooFewSequencesError(data, available, len(rows), samples, sequence_length)
    return _packed_rows(data.name, rows, tokenizer, sequence_length, available)


def _drawn(count: int, samples: int, generator: torch.Generator, too_few: TooFewSequencesError) -> Tensor:
    """Return `samples` different numbers below `count`, [samples] int64; raises `too_few` if there are not as many."""
    if count < samples:
        raise too_few
    return torch.randperm(count, generator=generator)[:samples]


def pack_evaluation(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    max_windows: int | None = None,
    objective: Objective = NEXT_TOKEN,
    seed: int = 0,
    overlap: int | None = None,
) -> PackedTokens:
    """Pack all of the data in its order, or the first `max_windows` sequences of it.

    Texts: consecutive non-overlapping windows, so that every token is in exactly one; the last is padded on the
    right. With a tokenizer that adds BOS (see `pack_calibration`) every text token is predicted exactly once; without,
    all but the first of each window, and a single token left for the last window, which nothing could predict, is
    left out. Examples and chats: packed as in `pack_calibration`, in file order. For a masked language model, `seed`
    says which tokens are masked. With an `overlap`, tagged words have as many sequences as they need (see
    `pack_labelled`), and `max_windows` counts documents.

    Raises `DataError`: an argument out of range; no token to predict; an example longer than `sequence_length`.
    """
    _require("sequence_length", sequence_length, 2)
    _require("max_windows", 1 if max_windows is None else max_windows, 1)
    if objective.labelled:
        every = range(len(data.documents))[:max_windows]
        return pack_labelled(data, tokenizer, objective, sequence_length=sequence_length, chosen=every, overlap=overlap)
    if objective.problem == "embedding":
        found = passages(data, tokenizer, objective, sequence_length=sequence_length)
        return pack_passages(data, tokenizer, objective, found, range(len(found))[:max_windows])
    if objective.problem == "masked_token":
        ids, text, available = text_windows(data, tokenizer, sequence_length=sequence_length)
        if not len(ids):
            raise DataError(f"{data.name} has no tokens; pass a longer text.")
        windows = (ids[:max_windows], text[:max_windows], available)
        return pack_masked(data, tokenizer, objective, windows, torch.Generator().manual_seed(seed))
    if data.kind != "text":
        examples = encode_examples(tokenizer, data)
        _require_fit(data, examples, sequence_length)
        rows = list(islice(_fill_rows(examples, sequence_length), max_windows))
        return _packed_rows(data.name, rows, tokenizer, sequence_length, sum(map(len, examples)))
    stream, bos = encode_texts(tokenizer, data), leading_bos(tokenizer)
    body = sequence_length - (bos is not None)
    whole, rest = divmod(len(stream), body)
    padding = body - rest if rest + (bos is not None) >= 2 else 0
    count = whole + (padding > 0)
    if count == 0:
        raise DataError(f"{data.name} has {len(stream)} tokens, too few to predict any; pass a longer text.")
    ids = torch.cat([stream, torch.full((padding,), _pad_id(tokenizer))])[: count * body].view(count, body)
    used = ids[:max_windows]
    return _packed_windows(data.name, used, bos, len(stream), padding if len(used) == count else 0)


def check_vocabulary(tokens: PackedTokens, vocabulary_size: int) -> None:
    """Check that every token has a row in the embedding, which has `vocabulary_size` of them.

    Raises `CheckpointError`: the tokenizer does not fit the model.
    """
    largest = int(tokens.token_ids.max())
    if largest >= vocabulary_size:
        raise CheckpointError(
            f"the tokenizer does not fit the model: {tokens.name} has token id {largest}, but the embedding has "
            f"{vocabulary_size} rows (ids 0 to {vocabulary_size - 1}); use the tokenizer the model was trained with."
        )


def _require(argument: str, value: int, smallest: int, largest: int | None = None) -> None:
    if value < smallest or (largest is not None and value > largest):
        allowed = f"at least {smallest}" + ("" if largest is None else f" and at most {largest}")
        raise DataError(f"{argument} (--{argument.replace('_', '-')}) is {value}, but must be {allowed}.")


def _require_fit(data: LoadedData, examples: list[EncodedExample], sequence_length: int) -> None:
    longest, number = max((len(example), -number) for number, example in enumerate(examples, start=1))
    if longest > sequence_length:
        too_long = sum(len(example) > sequence_length for example in examples)
        raise DataError(
            f"{data.name}, {data.kind} {-number} has {longest:,} tokens, more than --sequence-length {sequence_length} "
            f"({too_long:,} of {len(examples):,} do not fit); raise --sequence-length to at least {longest}, or "
            f"shorten or remove them."
        )


def _fill_rows(examples: Iterable[EncodedExample], sequence_length: int) -> Iterator[list[EncodedExample]]:
    """Yield rows of consecutive examples, each as many as fit."""
    row: list[EncodedExample] = []
    for example in examples:
        if row and sum(map(len, row)) + len(example) > sequence_length:
            yield row
            row = []
        row.append(example)
    if row:
        yield row


def _packed_windows(name: str, windows: Tensor, bos: int | None, available: int, padding: int = 0) -> PackedTokens:
    """Pack windows `[N, S]` or, before BOS is put in front, `[N, S - 1]`; `padding` counts the last row's."""
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
    valid = torch.ones_like(windows, dtype=torch.bool)
    if padding:
        valid[-1, -padding:] = False
    loss_mask = valid.clone()
    loss_mask[:, 0] = False
    return packed_tokens(name, windows.contiguous(), loss_mask, valid, available)


def _packed_rows(
    name: str,
    rows: list[list[EncodedExample]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    available: int,
) -> PackedTokens:
    token_ids = torch.full((len(rows), sequence_length), _pad_id(tokenizer))
    loss_mask = torch.zeros_like(token_ids, dtype=torch.bool)
    valid = torch.zeros_like(loss_mask)
    for number, row in enumerate(rows):
        ids = [token for example in row for token in example.token_ids]
        token_ids[number, : len(ids)] = torch.tensor(ids)
        loss_mask[number, : len(ids)] = torch.tensor([loss for example in row for loss in example.carries_loss])
        valid[number, : len(ids)] = True
    return packed_tokens(name, token_ids, loss_mask, valid, available)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return next(int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
