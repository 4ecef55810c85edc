"""`SOURCE[:WEIGHT]` taken apart, and sequences divided by weight."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest

from layer_surgery.data import WeightedSource, weighted_sources
from layer_surgery.data.weights import apportion
from layer_surgery.errors import DataError

# Weights


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.txt", "a.txt", 1),
        ("a.txt:2", "a.txt", 2),
        ("a.txt:0.25", "a.txt", 0.25),
        ("a.txt:1e3", "a.txt", 1000),
        ("bundled:3", "bundled", 3),
        (r"C:\texts\a.txt", r"C:\texts\a.txt", 1),
        (r"C:\texts\a.txt:2", r"C:\texts\a.txt", 2),
        ("owner/name#config@train[:1000]", "owner/name#config@train[:1000]", 1),
        ("owner/name@train[10:20]:4", "owner/name@train[10:20]", 4),
        ("a:b", "a:b", 1),
        ("a:2:3", "a:2", 3),
        ("", "", 1),
    ],
)
def test_only_a_number_at_the_end_is_a_weight(text: str, name: str, weight: float) -> None:
    assert weighted_sources([text]) == [WeightedSource(name, weight)]


def test_an_existing_file_of_the_whole_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = str(tmp_path / "a.txt:2")
    assert weighted_sources([text]) == [WeightedSource(str(tmp_path / "a.txt"), 2)]
    Path(text).write_text("one")
    for spelling in (text, "~/a.txt:2"):
        assert weighted_sources([spelling]) == [WeightedSource(spelling, 1)]
        assert weighted_sources([f"{spelling}:5"]) == [WeightedSource(spelling, 5)]


@pytest.mark.parametrize("weight", ["0", "-1", "0.0", "nan", "inf", "-inf", "1e999"])
def test_a_weight_must_be_finite_and_above_0(weight: str) -> None:
    expected = re.escape(f"--calibration a.txt:{weight} has the weight {weight}; allowed: a finite number above 0")
    with pytest.raises(DataError, match=expected):
        weighted_sources(["bundled", f"a.txt:{weight}"])


@pytest.mark.parametrize("weight", ["two", "", "50%", "1/2", "2,5"])
def test_a_mistyped_weight_of_a_file_that_exists_is_refused_as_such(tmp_path: Path, weight: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    with pytest.raises(DataError, match=rf"'{weight}' is not a weight.* such as {re.escape(str(file))}:2\."):
        weighted_sources([f"{file}:{weight}"])


def test_the_same_source_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    Path("link.txt").symlink_to("a.txt")
    Path("copy.txt").write_text("one")
    for first, second in (("bundled", "bundled:3"), ("o/n@train", "o/n@train:3")):
        with pytest.raises(DataError, match=rf"names '{first}' more than once; .* with a weight \({first}:4\)"):
            weighted_sources([first, "a.txt", second])
    for second in ("./a.txt", str(tmp_path / "a.txt"), "link.txt"):
        message = rf"names '{second}' more than once \(first as 'a.txt'\); give it once, with a weight \(a.txt:2.5\)"
        with pytest.raises(DataError, match=message):
            weighted_sources(["a.txt:2", f"{second}:0.5"])
    assert len(weighted_sources(["a.txt", "copy.txt", "o/n@train", "o/n@test"])) == 4


# Shares


@pytest.mark.parametrize(
    ("weights", "samples", "shares"),
    [
        ([5], 7, [7]),
        ([2, 1], 12, [8, 4]),
        ([2, 1], 128, [85, 43]),  # 85.3 and 42.7
        ([1, 1, 1], 8, [3, 3, 2]),  # of equal remainders the first
        ([47, 16, 15.8, 12, 6.1, 3.1], 10, [4, 2, 1, 1, 1, 1]),  # 6.1 and 3.1 get one, the others share eight
        ([10, 1.05, 0.05, 0.05], 11, [8, 1, 1, 1]),  # 1.04 of eleven, but only 0.86 of the nine that are left
        ([100, 1], 5, [4, 1]),  # 4.95 and 0.05
        ([1, 100], 2, [1, 1]),
        ([90, 9.1, 0.45, 0.45], 100, [89, 9, 1, 1]),  # the large one pays for the small ones
        ([0.1, 0.2, 0.3], 6, [1, 2, 3]),
        ([1e308, 1e308], 4, [2, 2]),
        ([1e308, 5e-324], 4, [3, 1]),
    ],
)
def test_shares(weights: list[float], samples: int, shares: list[int]) -> None:
    assert apportion(weights, samples) == shares


def test_shares_add_up_are_at_least_one_and_follow_the_weights() -> None:
    generator = random.Random(0)
    ordinary = 0
    for _ in range(300):
        weights = [generator.choice([1, 2, 3, generator.random(), 50]) for _ in range(generator.randint(1, 7))]
        samples = generator.randint(len(weights), 60)
        shares = apportion(weights, samples)
        assert sum(shares) == samples and min(shares) >= 1
        for (weight, share), (other, less) in itertools.permutations(zip(weights, shares, strict=True), 2):
            assert share >= less or weight <= other, "who weighs more does not get less"
        quotas = [samples * weight / sum(weights) for weight in weights]
        if min(quotas) >= 1:
            ordinary += 1
            assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    assert ordinary > 50
