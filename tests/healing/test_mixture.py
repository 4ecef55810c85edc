"""Losses as users write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layer_surgery.errors import UserError
from layer_surgery.healing.losses import LOSSES
from layer_surgery.healing.mixture import parse_losses


def test_names_weights_and_options() -> None:
    losses = parse_losses(["kl", "hidden:0.5", "jsd:2:beta=0.3, temperature=2"])
    assert [(loss.name, loss.weight, dict(loss.options)) for loss in losses] == [
        ("kl", 1.0, {}),
        ("hidden", 0.5, {}),
        ("jsd", 2.0, {"beta": 0.3, "temperature": 2.0}),
    ]
    assert losses[2].settings == {"temperature": 2.0, "beta": 0.3}
    assert losses[0].settings == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mix.yaml", "kl: {weight: 2, temperature: 3}\nhidden: 0.5\n"),
        ("mix.json", '{"kl": {"weight": 2, "temperature": 3}, "hidden": 0.5}'),
    ],
)
def test_a_file_says_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    from_file = parse_losses([str(tmp_path / name), "ce:0.1"])
    from_text = parse_losses(["kl:2:temperature=3", "hidden:0.5", "ce:0.1"])
    assert [loss.to_dict() for loss in from_file] == [loss.to_dict() for loss in from_text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kkl:1", "--loss kkl:1: unknown loss 'kkl'. Did you mean 'kl'?"),
        ("kl:-1", "--loss kl:-1: the weight of 'kl' is '-1'; allowed: a number above 0."),
        ("kl:nan", "the weight of 'kl' is 'nan'; allowed: a number above 0."),
        (
            "kl:1:temprature=2",
            "the loss 'kl' has no option 'temprature'. Did you mean 'temperature'? It has: temperature.",
        ),
        ("kl:1:temperature=0", "'temperature' is '0'; allowed: above 0."),
        ("jsd:1:beta=1", "'beta' is '1'; allowed: above 0, below 1."),
        ("relations:1:heads=2.5", "'heads' is '2.5'; allowed: a whole number, 1 or more."),
        ("hidden:1:beta=1", "the loss 'hidden' has no option 'beta'. It has: projected."),
        ("kl:1:temperature", "'temperature' is no OPTION=VALUE; write NAME, NAME:WEIGHT"),
        ("nowhere.yaml", "--loss nowhere.yaml cannot be read (No such file or directory)."),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_losses([text])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mix.json", "{", "is no JSON ("),
        ("mix.yaml", "a: [", "is no YAML ("),
        ("mix.yaml", "- kl", "must have an object of losses by name"),
        ("mix.yaml", "kl: true", "the weight of 'kl' is True; allowed: a number above 0."),
        ("mix.yaml", "kl: {temperature: [1]}", "'temperature' is [1]; allowed: above 0."),
        ("mix.yaml", "!!python/object/apply:os.getcwd []", "is no YAML ("),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        parse_losses([str(tmp_path / name)])


def test_no_loss_and_one_loss_twice_are_refused() -> None:
    with pytest.raises(UserError, match="--loss is empty; write NAME"):
        parse_losses([])
    with pytest.raises(UserError, match="'kl' more than once"):
        parse_losses(["kl:1", "ce", "kl:2"])


def test_every_loss_can_be_asked_for_with_its_defaults_written_out() -> None:
    for entry in LOSSES:
        written = ",".join(f"{name}={value}" for name, value in entry.options.items())
        (loss,) = parse_losses([f"{entry.name}:1:{written}"])
        assert loss.settings == entry.options
        assert entry.source.startswith("https://")


def test_the_page_lists_every_loss_with_its_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    listed = {
        name: dict(pair.split("=") for pair in options.split(", ") if pair)
        for name, options in re.findall(r"^\| `(\w+)` \| ?([^|]*?) \|", page, re.MULTILINE)
    }
    assert listed == {entry.name: {name: f"{default:g}" for name, default in entry.options.items()} for entry in LOSSES}
