"""Each kind of linear that a refit re-solves, against least squares on rows from the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from surgery_helpers import REFIT_TOKENS as TOKENS
from surgery_helpers import check_resolved, inputs_and_outputs, refitted
from tiny_models import make_test_plan, tiny_model, whole_boundaries, without_layers
from torch import Tensor
from transformers import PreTrainedModel

#: (attention out, MLP down) and what the layer multiplies both with: with biases, with a factor, side by side.
OUT = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", 1.0),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj", 1.0),
    "granite": ("self_attn.o_proj", "mlp.down_proj", 0.6),
    "cohere": ("self_attn.o_proj", "mlp.down_proj", 1.0),
}
both = pytest.mark.parametrize("model_type", OUT)


def bias_of(model: PreTrainedModel, name: str) -> Tensor | float:
    parameters = dict(model.named_parameters())
    found: Tensor | None = parameters.get(f"{name}.bias")
    return 0.0 if found is None else found.detach()


@both
def test_mlp_out_before_a_removed_run(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, layers=5)
    result = refitted(model, make_test_plan(5, removed=[2, 3], method="remove"), tmp_path)
    _, name, scale = OUT[model_type]
    z, output = inputs_and_outputs(model, 1, name, TOKENS)
    states = whole_boundaries(model, TOKENS)
    prefix = f"model.layers.1.{name}"
    target = (states[4] - states[2]) / scale + output - bias_of(model, prefix)
    weight = model.get_parameter(f"{prefix}.weight").detach()
    check_resolved(result, (1, name), f"model.layers.1.{name}.weight", (z, target), weight)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_linears_that_share_their_input(tmp_path: Path, model_type: str, name: str) -> None:
    """Layer 1 stands where layer 0 stood: it reads the embeddings, and is to give what it gave on its own input."""
    model = tiny_model(model_type, layers=3)
    result = refitted(model, make_test_plan(3, removed=[0], method="remove"), tmp_path)
    z, _ = inputs_and_outputs(without_layers(model, [0]), 0, name, TOKENS)
    prefix = f"model.layers.1.{name}"
    target = inputs_and_outputs(model, 1, name, TOKENS)[1] - bias_of(model, prefix)
    weight = model.get_parameter(f"{prefix}.weight").detach()
    check_resolved(result, (1, name), f"model.layers.0.{name}.weight", (z, target), weight)


@both
def test_attention_out_behind_a_cut(tmp_path: Path, model_type: str) -> None:
    """It brings the stream to where the original's is after its attention."""
    model = tiny_model(model_type, layers=3)
    result = refitted(model, make_test_plan(3, removed=[0], method="remove"), tmp_path)
    operated = without_layers(model, [0])
    operated.load_state_dict(result.tensors(result.after), strict=False)
    name, mlp, scale = OUT[model_type]
    z, _ = inputs_and_outputs(operated, 0, name, TOKENS)
    states = whole_boundaries(model, TOKENS)
    middle = states[2] - scale * inputs_and_outputs(model, 1, mlp, TOKENS)[1]
    prefix = f"model.layers.1.{name}"
    target = (middle - states[0]) / scale - bias_of(model, prefix)
    weight = model.get_parameter(f"{prefix}.weight").detach()
    check_resolved(result, (1, name), f"model.layers.0.{name}.weight", (z, target), weight)


def test_rows_of_the_tests_above_are_not_the_originals(tmp_path: Path) -> None:
    """Guards them: with the original's own input there would be nothing to solve."""
    model = tiny_model(layers=3)
    ours, _ = inputs_and_outputs(without_layers(model, [0]), 0, "self_attn.q_proj", TOKENS)
    theirs, _ = inputs_and_outputs(model, 1, "self_attn.q_proj", TOKENS)
    assert not torch.allclose(ours, theirs, atol=0.1)
