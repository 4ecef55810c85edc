"""Arguments of the Python interface that are not what the options are: refused by name, before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import layer_surgery
from layer_surgery.config import CompressConfig, SweepConfig
from layer_surgery.config.declaring import Options
from layer_surgery.config.keywords import check_call
from layer_surgery.errors import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "3"}, "--layers is '3'; give whole numbers."),
        ({"layers": [3, 4.0]}, r"--layers is \[3, 4.0\]; give whole numbers."),
        ({"layers": [np.int64(3)]}, "give whole numbers."),
        ({"target_layers": 9.0}, "--target-layers is 9.0; give a whole number."),
        ({"keep": "0.1"}, "--keep is '0.1'; give a number."),
        ({"samples": None}, "--samples is None; give a whole number."),
        ({"refit": "yes"}, "--refit is 'yes'; give True or False."),
        ({"method": ["svd"]}, r"--method is \['svd'\]; give a text."),
        ({"calibration": 3}, "--calibration is 3; give texts."),
        ({"prompts": [3]}, r"--prompt is \[3\]; give texts."),
        ({"cache": 3}, "--cache is 3; give a path."),
        ({"tokenizer": 3}, "tokenizer is 3; give a tokenizer of transformers"),
        ({"scratch": "/no/such/folder"}, "scratch is /no/such/folder, which is not a directory; make it"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_with_the_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_surgery.compress("no-such-model", "output", **given)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (CompressConfig, {"layers": 3}),
        (CompressConfig, {"layers": range(3, 5)}),
        (CompressConfig, {"layers": iter([3])}),
        (CompressConfig, {"keep": 0, "layers": None, "refit": None}),
        (CompressConfig, {"calibration": [Path("a.txt"), "b.txt"], "eval_data": None, "output": Path("x")}),
        (CompressConfig, {"device": torch.device("cpu"), "dtype": torch.float32}),
        (SweepConfig, {"target_layers": 9, "keep": (0, 0.1), "method": "svd", "scorer": ["last"]}),
    ],
)
def test_what_options_take_passes(config: type[Options], given: dict[str, Any]) -> None:
    check_call("f", config, (), given)
    assert isinstance(config(**given), config)


def test_defaults_have_the_types_of_their_options() -> None:
    for config in (CompressConfig, SweepConfig):
        defaults = {field.name: field.default for field in attrs.fields(config)}
        check_call("f", config, (), defaults)


def test_an_unknown_argument_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"compress\(\) got an unexpected keyword argument 'sample'. Did you mean 'sam"):
        layer_surgery.compress("model", "output", sample=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"evaluate\(\) takes options by name only"):
        layer_surgery.evaluate("model", "baseline")  # type: ignore[call-arg]


def test_an_output_given_twice_is_refused() -> None:
    with pytest.raises(TypeError, match=r"compress\(\) got multiple values for argument 'output'"):
        layer_surgery.compress("model", "here", **{"output": "there"})  # type: ignore[misc]
