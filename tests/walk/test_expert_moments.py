"""Second moments of experts against a plain computation by autograd over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CALIBRATION, decoder_layers, settings, streamed, tiny_model, whole_losses
from torch import Tensor, nn

from layer_surgery.calibration.expert_channels import expert_orders, on_some_channels
from layer_surgery.calibration.moment_observer import MomentObserver
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.walk.expert_moments import ExpertMoments
from layer_surgery.walk.moments import LayerMoments
from layer_surgery.walk.walk import Walk

LAYER = 2


class Taken(MomentObserver):
    """Keeps the moments of the experts of one layer."""

    def __init__(self, experts: Experts) -> None:
        super().__init__({}, gradients=True, experts={LAYER: experts})
        self.moments: ExpertMoments | None = None

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        pass

    def reduce_experts(self, index: int, layer: nn.Module, experts: Experts, moments: ExpertMoments) -> None:
        self.moments = moments


def by_autograd(model: Any, experts: Experts) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each expert, its inner states [n, I] and the loss gradients at its outputs [n, D], valid tokens only.

    The experts are run by a dense formula: every expert on every token, added with the weights of those chosen.
    """
    module = decoder_layers(model)[LAYER].get_submodule(experts.module)
    found: dict[str, Any] = {}

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert in range(experts.number):
            up, down = getattr(module, experts.before)[expert], module.down_proj[expert]
            biases: Any = (0.0, 0.0)
            if experts.biased:
                biases = (module.gate_up_proj_bias[expert], module.down_proj_bias[expert])
            if not experts.transposed:
                up, down = up.T, down.T
            inner = module._apply_gate(hidden @ up + biases[0])
            out = inner @ down + biases[1]
            out.retain_grad()
            found[f"{expert}"] = (inner, out, (index == expert).any(dim=-1))
            total = total + out * (weights * (index == expert)).sum(dim=-1, keepdim=True)
        return total

    module.forward = forward
    attention_mask = CALIBRATION.valid.long()
    logits = model(CALIBRATION.token_ids, attention_mask=attention_mask, use_cache=False).logits
    whole_losses(logits, CALIBRATION).sum().backward()
    del module.forward
    valid = CALIBRATION.valid.flatten()
    return {
        expert: (inner[chosen & valid].detach(), out.grad[chosen & valid])
        for expert, (inner, out, chosen) in ((int(name), each) for name, each in found.items())
    }


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_moments_are_those_of_autograd(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, layers=4, dtype=torch.float32)
    experts = experts_of(decoder_layers(model)[LAYER])
    assert experts is not None
    expected = by_autograd(model, experts)
    taken = Taken(experts)
    with Walk(streamed(model, dtype=torch.float32), CALIBRATION, settings(tmp_path)) as walk:
        walk.backpropagate([taken], watch=[LAYER])
    moments = taken.moments
    assert moments is not None and moments.tokens == int(CALIBRATION.valid.sum())
    assert moments.chosen.tolist() == [len(expected[expert][0]) for expert in range(experts.number)]
    assert int(moments.chosen.sum()) == experts.chosen * moments.tokens
    gradients = torch.cat([each[1] for each in expected.values()])
    outputs = gradients.T @ gradients / len(gradients)
    assert torch.allclose(moments.output_moment(), outputs, rtol=1e-3, atol=1e-4 * float(outputs.abs().max()))
    for expert, (inner, own) in expected.items():
        inputs = inner.T @ inner / max(1, len(inner))
        scale = 1e-4 * float(inputs.abs().max()) + 1e-12
        assert torch.allclose(moments.input_moment(expert), inputs, rtol=1e-3, atol=scale)
        share = float(own.pow(2).sum()) / moments.tokens / float(outputs.trace())
        assert moments.weight(expert) == pytest.approx(share, rel=1e-3)


def test_an_expert_that_no_token_chose_costs_nothing_and_keeps_its_columns() -> None:
    model = tiny_model("mixtral", layers=4, dtype=torch.float32)
    experts = experts_of(decoder_layers(model)[LAYER])
    assert experts is not None
    module = decoder_layers(model)[LAYER].get_submodule(experts.module)
    rows = torch.randn(30, experts.count, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn(30, experts.hidden, generator=torch.Generator().manual_seed(1))
    inputs = torch.zeros(experts.number, experts.count, experts.count)
    inputs[0], chosen, squares = rows.T @ rows, torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    chosen[0], squares[0] = 30, gradients.pow(2).sum()
    moments = ExpertMoments(inputs, gradients.T @ gradients, squares, chosen, tokens=60)
    orders = expert_orders(experts, module, moments, LAYER)
    assert orders[0].costs()[0] > 0 and all(order.costs()[0] == 0 for order in orders[1:])
    assert all(sorted(order.order) == list(range(experts.count)) for order in orders)
    kept = torch.stack([order.kept(8) for order in orders])
    some = on_some_channels(experts, module, moments, kept, LAYER)
    whole = module.get_parameter("down_proj").detach()
    assert torch.allclose(some[1][:, kept[1]], whole[1][:, kept[1]], atol=1e-5)
    assert not torch.allclose(some[0][:, kept[0]], whole[0][:, kept[0]], atol=1e-3)
    assert int((some[1] != 0).any(dim=0).sum()) == 8
