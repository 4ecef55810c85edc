"""The walk computes what the whole model computes, wherever things are kept, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    GradientObserver,
    changes,
    decoder_layers,
    hooks_on,
    largest_difference,
    largest_gradient_difference,
    packed_tokens,
    padded_on_the_right,
    settings,
    snapshot,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_gradients,
    whole_boundaries,
    whole_gradients,
    whole_logits,
    whole_losses,
    without_layers,
)
from torch import Tensor, nn

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.walk import walk as walk_module
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

TOKENS = packed_tokens(5, 12, excluded=0.3)
PADDED = packed_tokens(5, 12, padding=True, excluded=0.3)
# Not Gemma: its norms multiply by their weights in float32, also in a float64 model.
FAMILIES = ("llama", "olmo3", "starcoder2")
WHERE = [
    pytest.param(1 << 29, 1 << 29, id="all in memory"),
    pytest.param(0, 1 << 29, id="layers from disk"),
    pytest.param(1 << 29, 0, id="boundaries on disk"),
    pytest.param(0, 0, id="all on disk"),
]


def layer_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gradients.items() if name.startswith("model.layers.")}


# Right


@pytest.mark.parametrize(("resident", "boundaries"), WHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_and_weight_gradients_equal_the_whole_models(
    tmp_path: Path, family: str, resident: int, boundaries: int
) -> None:
    model = tiny_model(family)
    expected = layer_gradients(whole_gradients(model, TOKENS))
    assert len(expected) == sum(1 for _ in decoder_layers(model).parameters())
    path = tiny_checkpoint(tmp_path, model, max_shard_size="30KB")
    where = settings(tmp_path, boundary_memory_bytes=boundaries)
    with Walk(streamed(path, resident_bytes=resident), TOKENS, where) as walk:
        assert walk.forward(range(4), keep=True) == walk.boundary(4)
        for position, states in enumerate(whole_boundaries(model, TOKENS)):
            assert largest_difference(walk.boundary(position).read(slice(0, 5)), states) < 1e-9
        assert largest_gradient_difference(walked_gradients(walk), expected) < 1e-9


@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_each_sequence_equals_the_whole_models(tmp_path: Path, family: str, tokens: PackedTokens) -> None:
    model = tiny_model(family)
    expected = whole_losses(whole_logits(model, tokens), tokens)
    with Walk(streamed(model), tokens, settings(tmp_path)) as walk:
        losses = walk.losses(walk.forward(range(4), keep=False))
    assert largest_difference(losses.sums, expected) < 1e-9
    assert losses.tokens.tolist() == tokens.loss_mask.sum(dim=1).tolist()


def test_mean_loss_equals_the_one_that_transformers_computes(tmp_path: Path) -> None:
    model = tiny_model()
    labels = torch.where(TOKENS.loss_mask, TOKENS.token_ids, -100)
    with torch.no_grad():
        expected = model(TOKENS.token_ids, labels=labels, use_cache=False).loss.item()
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk:
        mean = walk.losses(walk.forward(range(4), keep=False)).mean
    # transformers computes its loss in float32.
    assert mean == pytest.approx(expected, rel=1e-6)


def test_gradient_that_leaves_the_walk_is_that_of_the_embeddings(tmp_path: Path) -> None:
    model = tiny_model()
    embedded = model.get_input_embeddings()(TOKENS.token_ids).detach().requires_grad_()
    loss = whole_losses(model(inputs_embeds=embedded).logits, TOKENS).sum()
    (expected,) = torch.autograd.grad(loss, embedded)
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk, walk.new_store() as store:
        walk.new_store = lambda: nullcontext(store)  # type: ignore[assignment,method-assign,return-value]
        walk.backpropagate([])
        assert largest_difference(Boundary(store, 0).read(slice(0, 5)), expected) < 1e-9


def test_backward_walk_that_stops_early_sees_the_same_gradients(tmp_path: Path) -> None:
    model = tiny_model()
    expected = layer_gradients(whole_gradients(model, TOKENS))
    observer = GradientObserver()
    model_on_the_way = streamed(model)
    with Walk(model_on_the_way, TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(4), keep=True)
        loaded: list[int] = []
        layer = model_on_the_way.layer
        model_on_the_way.layer = lambda index, _ahead: (loaded.append(index), layer(index))[1]  # type: ignore
        walk.backpropagate([observer], watch=[2])
    assert loaded == [3, 2]
    watched = {name: tensor for name, tensor in expected.items() if name.startswith("model.layers.2.")}
    assert largest_gradient_difference(observer.gradients, watched) < 1e-9


def check_losses_and_gradients(tokens: PackedTokens, scratch: Path, batch_size: int) -> None:
    """Compare a walk with the whole model."""
    model = tiny_model()
    expected = layer_gradients(whole_gradients(model, tokens))
    sums = whole_losses(whole_logits(model, tokens), tokens)
    with Walk(streamed(model), tokens, settings(scratch, batch_size=batch_size)) as walk:
        losses = walk.losses(walk.forward(range(4), keep=False))
        gradients = walked_gradients(walk)
    assert largest_difference(losses.sums, sums) < 1e-10
    assert largest_gradient_difference(gradients, expected) < 1e-10


# One token at a time; single rows in pieces of 5 tokens; rows in pairs.
@pytest.mark.parametrize("elements", [1, 5 * 61, 2 * 12 * 61 + 1])
def test_cutting_the_head_into_chunks_changes_neither_losses_nor_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(walk_module, "LOGITS_AT_A_TIME", elements)
    check_losses_and_gradients(PADDED, tmp_path, 5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_changes_neither_losses_nor_gradients(tmp_path: Path, batch_size: int) -> None:
    check_losses_and_gradients(packed_tokens(8, 10, padding=True, excluded=0.2), tmp_path, batch_size)


def test_no_more_logits_exist_at_a_time_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "LOGITS_AT_A_TIME", 5 * 61)
    with Walk(streamed(tiny_model()), TOKENS, settings(tmp_path, batch_size=5)) as walk:
        sizes = []
        head = walk.rehearsal.head

        def measured(hidden: Tensor, inputs: None) -> Tensor:
            logits = head(hidden, inputs)
            sizes.append(logits.numel())
            return logits

        monkeypatch.setattr(walk.rehearsal, "head", measured)
        walk.losses(walk.forward(range(4), keep=False))
    assert max(sizes) == 5 * 61


def test_right_padding_changes_nothing_for_valid_tokens(tmp_path: Path) -> None:
    short = packed_tokens(3, 9, excluded=0.3)
    padded = padded_on_the_right(short, 4)
    model = streamed(tiny_model("olmo3"))
    results = []
    for tokens in (short, padded):
        with Walk(model, tokens, settings(tmp_path)) as walk:
            losses = walk.losses(walk.forward(range(4), keep=True))
            states = walk.boundary(4).read(slice(0, 3))[:, :9].clone()
            results.append((losses.sums, states, walked_gradients(walk)))
    assert largest_difference(results[0][0], results[1][0]) < 1e-10
    assert largest_difference(results[0][1], results[1][1]) < 1e-10
    assert largest_gradient_difference(results[0][2], results[1][2]) < 1e-10


def test_bfloat16_gradients_are_summed_in_float32(tmp_path: Path) -> None:
    with Walk(streamed(tiny_model(), dtype=torch.bfloat16), TOKENS, settings(tmp_path, batch_size=1)) as walk:
        gradients = walked_gradients(walk)
    assert {tensor.dtype for tensor in gradients.values()} == {torch.float32}


# Paths


@pytest.mark.parametrize("keep", [True, False])
def test_path_that_skips_layers_equals_the_model_without_them(tmp_path: Path, keep: bool) -> None:
    model = tiny_model()
    expected = whole_losses(whole_logits(without_layers(model, [1, 2]), TOKENS), TOKENS)
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(4), keep=True)
        losses = walk.losses(walk.forward([0, 3], keep=keep))
    assert largest_difference(losses.sums, expected) < 1e-9


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every layer that is run."""
    seen: list[int] = []
    step = Walk.step

    def seen_step(self: Walk, index: int, *rest: Any, **more: Any) -> None:
        seen.append(index)
        step(self, index, *rest, **more)

    monkeypatch.setattr(Walk, "step", seen_step)
    return seen


def test_kept_boundaries_are_used_again_as_far_as_the_path_is_the_same(tmp_path: Path, steps: list[int]) -> None:
    with Walk(streamed(tiny_model()), TOKENS, settings(tmp_path)) as walk:
        walk.forward([0, 1, 2, 3], keep=True)
        walk.forward([0, 1, 3], keep=True)
        walk.forward([0, 1, 3], keep=True)
    assert steps == [0, 1, 2, 3, 3]


def test_observers_see_every_layer_also_where_the_boundaries_are_known(tmp_path: Path) -> None:
    class Seen(Observer):
        def __init__(self) -> None:
            self.layers: list[int] = []

        def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
            self.layers.append(index)

    observer = Seen()
    with Walk(streamed(tiny_model()), TOKENS, settings(tmp_path, batch_size=5)) as walk:
        walk.forward(range(4), keep=True)
        walk.forward(range(4), keep=True, observers=[observer])
    assert observer.layers == [0, 1, 2, 3]


def test_a_forgotten_position_is_walked_again(tmp_path: Path, steps: list[int]) -> None:
    with Walk(streamed(tiny_model()), TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(4), keep=True)
        walk.forget(2)
        walk.forward(range(4), keep=True)
    assert steps == [0, 1, 2, 3, 2, 3]


def test_walk_that_keeps_nothing_holds_one_boundary(tmp_path: Path) -> None:
    with Walk(streamed(tiny_model()), TOKENS, settings(tmp_path)) as walk:
        last = walk.forward(range(4), keep=False)
        assert [candidate for candidate in range(-1, 6) if candidate in walk.store] == [last.slot]


# Nothing left behind


class Raising(Observer):
    """Raises at one layer, with a hook of its own and the package's gradient hooks in place."""

    def __init__(self, at: int, where: str) -> None:
        self.at, self.where = at, where
        self.parameters: list[nn.Parameter] = []

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        self.parameters += list(layer.parameters())
        with accumulated_gradients(dict(layer.named_parameters())):
            if index == self.at and self.where == "layer":
                layer.mlp.forward = None  # calling it raises
            try:
                if index == self.at and self.where == "entering":
                    raise RuntimeError("on purpose")
                yield
                if index == self.at and self.where == "leaving":
                    raise RuntimeError("on purpose")
            finally:
                vars(layer.mlp).pop("forward", None)

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        if index == self.at and self.where == "boundaries":
            raise RuntimeError("on purpose")


def assert_clean(model: StreamedModel, originals: list[nn.Module], observer: Raising | None = None) -> None:
    assert list(model.layers) == originals, "the layers are the model's own again, not stubs"
    assert hooks_on(model.model) == []
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert parameter.is_meta == name.startswith("model.layers."), name
    for parameter in observer.parameters if observer else []:
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("resident", [0, 1 << 29])
def test_nothing_is_left_on_the_model_after_success(tmp_path: Path, resident: int) -> None:
    model = streamed(tiny_checkpoint(tmp_path), resident_bytes=resident)
    originals = list(model.layers)
    observer = Raising(-1, "")
    with Walk(model, TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(4), keep=True, observers=[observer])
        walk.backpropagate([observer])
    assert len(observer.parameters) == 2 * sum(1 for layer in originals for _ in layer.parameters())
    assert_clean(model, originals, observer)


@pytest.mark.parametrize("resident", [0, 1 << 29])
@pytest.mark.parametrize("where", ["entering", "leaving", "boundaries", "layer"])
def test_nothing_is_left_on_the_model_after_an_exception_on_the_way_forward(
    tmp_path: Path, where: str, resident: int
) -> None:
    model = streamed(tiny_checkpoint(tmp_path), resident_bytes=resident)
    originals, observer = list(model.layers), Raising(2, where)
    with Walk(model, TOKENS, settings(tmp_path)) as walk, pytest.raises((RuntimeError, TypeError)):
        walk.forward(range(4), keep=True, observers=[observer])
    assert_clean(model, originals, observer)


@pytest.mark.parametrize("where", ["entering", "leaving", "layer"])
def test_nothing_is_left_on_the_model_after_an_exception_on_the_way_back(tmp_path: Path, where: str) -> None:
    model = streamed(tiny_checkpoint(tmp_path))
    originals, observer = list(model.layers), Raising(1, where)
    with Walk(model, TOKENS, settings(tmp_path)) as walk, pytest.raises((RuntimeError, TypeError)):
        walk.backpropagate([observer])
    assert_clean(model, originals, observer)


def test_layers_are_restored_when_the_model_raises_during_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(tiny_model())
    originals = list(model.layers)
    walk = Walk(model, TOKENS, settings(tmp_path))
    hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
    monkeypatch.setattr(model.model.get_submodule("model.norm"), "forward", None)
    with pytest.raises(TypeError):
        walk.rehearsal.head(hidden)
    assert list(model.layers) == originals


def test_walk_frees_its_boundaries_after_an_exception(tmp_path: Path) -> None:
    walk = Walk(streamed(tiny_model()), TOKENS, settings(tmp_path, boundary_memory_bytes=0))
    with pytest.raises(RuntimeError), walk:
        walk.forward(range(4), keep=True, observers=[Raising(2, "leaving")])
    assert not any(slot in walk.store for slot in range(-1, 6))


def test_a_walk_goes_on_rightly_after_an_exception(tmp_path: Path) -> None:
    model = tiny_model()
    expected = whole_losses(whole_logits(model, TOKENS), TOKENS)
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk:
        with pytest.raises(RuntimeError):
            walk.forward(range(4), keep=True, observers=[Raising(2, "boundaries")])
        assert largest_difference(walk.losses(walk.forward(range(4), keep=True)).sums, expected) < 1e-9


def test_a_users_model_in_memory_is_untouched(tmp_path: Path) -> None:
    model = tiny_model().train()
    calls: list[int] = []
    handles = [
        decoder_layers(model)[1].register_forward_hook(lambda *_: calls.append(1)),
        model.get_submodule("lm_head").register_full_backward_hook(lambda *_: calls.append(2)),
        decoder_layers(model)[0].mlp.up_proj.weight.register_hook(lambda _gradient: calls.append(3)),
    ]
    decoder_layers(model)[2].requires_grad_(False)
    before = snapshot(model)
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk:
        walked_gradients(walk)
    assert changes(before, snapshot(model)) == []
    assert calls == [], "the walk runs its own modules"
    model(TOKENS.token_ids, use_cache=False).logits.sum().backward()
    assert sorted(calls) == [1, 2, 3], "the user's hooks still work"
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("raises", [False, True])
def test_accumulated_gradients_leave_the_parameters_as_they_were(raises: bool) -> None:
    linear = nn.Linear(3, 2).requires_grad_(False)
    x = torch.ones(4, 3)
    with (
        pytest.raises(RuntimeError) if raises else torch.enable_grad(),
        accumulated_gradients(dict(linear.named_parameters())) as sums,
    ):
        for _ in range(2):
            linear(x).sum().backward()
            assert linear.weight.grad is None
        if raises:
            raise RuntimeError("on purpose")
    assert torch.equal(sums["weight"], torch.full((2, 3), 8.0))
    assert hooks_on(linear) == []
    assert not linear.weight.requires_grad
    assert linear.weight.grad is None
