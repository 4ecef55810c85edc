"""Data sets from the Hugging Face hub, through `datasets`. No code of a data set is ever run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layer_surgery.data.documents import LoadedData, Purpose, Text, Wanted
from layer_surgery.data.rows import Row, Table, documents_from
from layer_surgery.errors import DataError, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """A data set that has a short name."""

    repository: str
    splits: Mapping[Purpose, str]
    config: str | None = None
    lines_of: str | None = None
    """A column whose rows are the lines of one text: they are joined by blank lines, empty rows included, which is
    how perplexity on this data set is reported everywhere."""
    files: Mapping[str, str] | None = None  #: Split -> the one file of it that is streamed.
    limit: int | None = None  #: Number of rows from the start that are read; said in `LoadedData.origin`.


KNOWN_DATASETS: dict[str, KnownDataset] = {
    "wikitext2": KnownDataset(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits={"calibration": "train", "evaluation": "test"},
        lines_of="text",
    ),
    "c4": KnownDataset(
        repository="allenai/c4",
        splits={"calibration": "train", "evaluation": "validation"},
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        limit=5000,
    ),
    "gsm8k": KnownDataset(
        repository="openai/gsm8k", config="main", splits={"calibration": "train", "evaluation": "test"}
    ),
}


@dataclass(frozen=True)
class HubReference:
    """`NAME[#CONFIG][@SPLIT]`, taken apart."""

    source: str
    known: KnownDataset | None
    repository: str
    config: str | None
    split: str | None


def parse_reference(source: str, names: Sequence[str]) -> HubReference:
    """Take a hub source apart; `names` are all names a bare word may have, for the error message.

    Raises `DataError`: an unknown bare word, or not of the form `OWNER/NAME[#CONFIG][@SPLIT]`.
    """
    match = re.fullmatch(r"(?P<name>[^#@]+)(#(?P<config>[^#@]+))?(@(?P<split>[^#@]+))?", source)
    name = match["name"] if match else source
    known = KNOWN_DATASETS.get(name)
    if match and (known or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        repository = known.repository if known else name
        return HubReference(source, known, repository, match["config"], match["split"])
    if match and "/" not in name:
        raise DataError(
            f"{unknown_name('data set', name, names)} A file, or OWNER/NAME of a hub data set, may be passed as well."
        )
    raise DataError(f"'{source}' is neither a file nor a hub data set of the form OWNER/NAME[#CONFIG][@SPLIT].")


def load_hub(reference: HubReference, part: Purpose, column: str | None, wanted: Wanted = "text") -> LoadedData:
    """Read a hub data set; without `@SPLIT`, calibration reads `train`, evaluation `test` or else `validation`.

    Raises `DataError`: the hub cannot be reached, or it has no such data set, config, split or columns.
    """
    same = (known.lines_of for known in KNOWN_DATASETS.values() if known.repository == reference.repository)
    lines_of = next(same, None)
    try:
        dataset, origin = _open(reference, part)
        table = _table(reference.source, dataset, reference.known.limit if reference.known else None)
        if lines_of is not None and column in (None, lines_of) and wanted == "text":
            text = "\n\n".join(str(row[lines_of]) for _, row in table.read([lines_of]))
            return LoadedData(reference.source, [Text(text)], "text", origin)
        kind, documents = documents_from(table, column, wanted)
        return LoadedData(reference.source, documents, kind, origin)
    except DataError:
        raise
    except Exception as error:  # whatever the network, the hub client and the data set's format come up with
        reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") or "no reason given"
        raise DataError(
            f"cannot read data set '{reference.source}' from the hub ({type(error).__name__}: {reason}); check its "
            "name and the connection, or pass a local .txt, .jsonl, .json, .csv or .parquet file."
        ) from error


def _open(reference: HubReference, part: Purpose) -> tuple[Dataset | IterableDataset, str]:
    """Return the data set and its origin in words."""
    import datasets

    known, repository = reference.known, reference.repository
    if known and known.files:
        split = reference.split or known.splits[part]
        if reference.config is not None:
            raise DataError(f"data set '{reference.source}' takes no #CONFIG; leave it out.")
        if split not in known.files:
            raise DataError(unknown_name(f"split of {repository}", split, known.files))
        file = known.files[split]
        rows = f"first {known.limit:,} documents of {file}" if known.limit else f"file {file}"
        dataset = datasets.load_dataset(repository, data_files={split: file}, split=split, streaming=True)
        return dataset, f"{repository}, {rows}"
    if known and reference.config is None and reference.split is None:
        config, split = known.config, known.splits[part]
    else:
        config = _choose_config(reference, datasets.get_dataset_config_names(repository))
        split = _choose_split(reference, part, datasets.get_dataset_split_names(repository, config))
    dataset = datasets.load_dataset(repository, config, split=split)
    return dataset, f"{repository}, config {config}, split {split}"


def _choose_config(reference: HubReference, configs: Sequence[str]) -> str:
    wanted = reference.config or (reference.known.config if reference.known else None)
    if wanted is not None:
        if wanted not in configs:
            raise DataError(unknown_name(f"config of {reference.repository}", wanted, configs))
        return wanted
    if len(configs) == 1 or "default" in configs:
        return "default" if "default" in configs else configs[0]
    raise DataError(
        f"data set {reference.repository} has several configs; choose one with {reference.repository}#CONFIG: "
        f"{', '.join(configs)}."
    )


def _choose_split(reference: HubReference, part: Purpose, splits: Sequence[str]) -> str:
    """Return `@SPLIT`, which may be a slice such as `train[:1000]` that `datasets` understands, or the part's split."""
    if reference.split is not None:
        if re.split(r"[\[+]", reference.split)[0] not in splits:
            raise DataError(unknown_name(f"split of {reference.repository}", reference.split, splits))
        return reference.split
    wanted = ("train",) if part == "calibration" else ("test", "validation")
    if found := [split for split in wanted if split in splits]:
        return found[0]
    raise DataError(
        f"data set {reference.repository} has no split {' or '.join(wanted)} for {part}; choose one with @SPLIT: "
        f"{', '.join(splits)}."
    )


def _table(name: str, dataset: Dataset | IterableDataset, limit: int | None) -> Table:
    columns = dataset.column_names
    if columns is None:  # a stream whose features are not known in advance
        columns = list(next(iter(dataset), {}))

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        rows = itertools.islice(dataset.select_columns(list(wanted)), limit)
        return ((f"row {number}", row) for number, row in enumerate(rows, start=1))

    return Table(name, tuple(columns), read)
