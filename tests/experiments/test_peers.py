"""Peers of the comparison at equal size: at full size they change nothing, and what they claim to equal they equal."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import largest_difference, packed_tokens, settings, streamed, tiny_model, walked_logits
from torch import Tensor

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.walk.self_check import check_walk
from layer_surgery.walk.walk import Walk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "task_aware"))

from peers.desk import Desk, UnreachableSize
from peers.extended import projection
from peers.flatten import alike_pairs, flatten_pairs, flattened, side_by_side, with_weights
from peers.ghosted import ghosted, with_maps
from peers.modegpt import modegpt, narrowed_keys, narrowed_mlp, narrowed_values
from peers.slicegpt import _moments, sliced, stored_parameters
from sizes import Report

TOKENS = packed_tokens(24, 12, padding=True, excluded=0.3)
TYPES = ["llama", "qwen2"]


@contextmanager
def desk_of(model: Any, scratch: Path) -> Iterator[Desk]:
    with Walk(streamed(open_checkpoint(model)), TOKENS, settings(scratch)) as walk:
        yield Desk(walk=walk, new_scratch=lambda name: Path(tempfile.mkdtemp(prefix=name, dir=scratch)))


def logits(checkpoint: Any, scratch: Path) -> Tensor:
    model = streamed(checkpoint)
    check_walk(model)
    return walked_logits(model, TOKENS, settings(scratch))


@pytest.mark.parametrize("model_type", TYPES)
def test_at_full_size_nothing_changes(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    expected = logits(open_checkpoint(model), tmp_path)
    with desk_of(model, tmp_path) as desk:
        parts = desk.parts()
        for made in (
            modegpt(desk, 1.0),
            flattened(desk, 1.0),
            ghosted(desk, 1.0),
            sliced(desk, parts, parts.width),
        ):
            assert largest_difference(logits(made.checkpoint, tmp_path), expected) < 1e-9
            if "stream" not in made.kept[0]:  # SliceGPT stores shortcuts and a head of its own
                assert made.parameters == desk.checkpoint.parameters


@pytest.mark.parametrize("model_type", TYPES)
def test_modegpts_parts_are_exact_where_nothing_is_cut(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    with desk_of(model, tmp_path) as desk:
        parts, (seen, _influence) = desk.parts(), desk.observed()
        with desk.walk.model.layer(1) as layer:
            stream = torch.randn(2, 6, parts.width, dtype=torch.float64)
            call = desk.walk.rehearsal.call(1, TOKENS.token_ids[:2, :6])
            expected = call(layer, stream)
            for new in (
                narrowed_mlp(layer, parts, seen.channels[1], parts.channels, 0.1, 1_000_000),
                narrowed_keys(layer, parts, seen.squares[1], parts.head // 2),
                narrowed_values(layer, parts, seen.values[1], parts.head),
            ):
                assert largest_difference(call(with_weights(layer, new), stream), expected) < 1e-9


@pytest.mark.parametrize("model_type", TYPES)
def test_modegpt_counts_what_is_not_zero(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    with desk_of(model, tmp_path) as desk:
        made, parts = modegpt(desk, 0.8), desk.parts()
        bound = desk.bound(0.8)
        assert bound - 3 * parts.width < made.parameters <= bound
        stored = made.checkpoint.source
        gone = 0
        for index in range(desk.depth):
            prefix = desk.checkpoint.layer_prefix(index)
            read = stored.read([name for name in stored.specs if name.startswith(prefix)], torch.device("cpu"))
            zeros = {name.removeprefix(prefix): int((tensor == 0).sum()) for name, tensor in read.items()}
            gone += sum(zeros[name] for name in zeros if "self_attn" in name)
            gone += 3 * zeros["mlp.down_proj.weight"]  # with the rows of gate and up
        assert desk.checkpoint.parameters - gone == made.parameters


def test_slicegpt_equals_the_sliced_model(tmp_path: Path) -> None:
    """Naive twin: weights rotated and sliced, shortcuts between the places, norms without scales."""
    model, rank = tiny_model("llama"), 20
    with desk_of(model, tmp_path) as desk, torch.no_grad():
        parts = desk.parts()
        made = sliced(desk, parts, rank)
        assert made.parameters == stored_parameters(desk, parts, rank)
        places = _moments(desk, parts, True)
        bases = [torch.linalg.eigh(place)[1][:, -rank:] for place in places]
        assert largest_difference(bases[0] @ bases[0].T, projection(places[0], rank)) < 1e-9
        ids = TOKENS.token_ids[:3]
        x = model.get_input_embeddings()(ids) @ bases[0]

        def normed(y: Tensor) -> Tensor:
            return y / (y.pow(2).sum(-1, keepdim=True) / parts.width + model.config.rms_norm_eps).sqrt()

        for index, layer in enumerate(model.model.layers):
            before, between, after = bases[2 * index : 2 * index + 3]
            small = with_weights(
                layer,
                {
                    name: {"weight": layer.get_submodule(name).weight * layer.input_layernorm.weight @ before}
                    for name in (parts.query, parts.key, parts.value)
                }
                | {parts.attention_out: {"weight": between.T @ layer.get_submodule(parts.attention_out).weight}}
                | {
                    name: {"weight": layer.get_submodule(name).weight * layer.post_attention_layernorm.weight @ between}
                    for name in (parts.gate, parts.up)
                }
                | {parts.down: {"weight": after.T @ layer.get_submodule(parts.down).weight}},
            )
            keywords = desk.walk.rehearsal.call(index, ids).kwargs
            x = x @ before.T @ between + small.self_attn(normed(x), **keywords)[0]
            x = x @ between.T @ after + small.mlp(normed(x))
        head = model.get_output_embeddings().weight * model.model.norm.weight @ bases[-1]
        # The norm of the stock class computes in float32.
        assert largest_difference(logits(made.checkpoint, tmp_path)[:3], normed(x) @ head.T) < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_a_flattened_layer_is_both_on_one_input(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    with desk_of(model, tmp_path) as desk, torch.no_grad():
        parts, first, second = desk.parts(), *model.model.layers[1:3]
        call = desk.walk.rehearsal.call(1, TOKENS.token_ids[:2])
        x = torch.randn(2, 12, parts.width, dtype=torch.float64)
        both = with_weights(first, side_by_side(first, second, parts))
        middle = x + sum(layer.self_attn(layer.input_layernorm(x), **call.kwargs)[0] for layer in (first, second))
        expected = middle + sum(layer.mlp(layer.post_attention_layernorm(middle)) for layer in (first, second))
        assert largest_difference(call(both, x), expected) < 1e-9
        made = flatten_pairs(desk, parts, [1], parts.channels + 3, 0.1)
        assert made.checkpoint.parameters == made.parameters
        logits(made.checkpoint, tmp_path)  # walks
        with pytest.raises(UnreachableSize):
            flattened(desk, 0.01)


def test_pairs_are_those_with_the_least_sum() -> None:
    assert alike_pairs([5, 1, 2, 1, 9], 1) == [1]
    assert alike_pairs([2.0, 1.5, 2.0, 9, 9], 2) == [0, 2]  # not 1, which is the least by itself


def test_maps_in_the_place_of_layers_that_do_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    for index in (1, 2):
        model.model.layers[index].self_attn.o_proj.weight.data.zero_()
        model.model.layers[index].mlp.down_proj.weight.data.zero_()
    expected = logits(open_checkpoint(model), tmp_path)
    with desk_of(model, tmp_path) as desk:
        parts = desk.parts()
        made = with_maps(desk, parts, [1, 2])
        assert largest_difference(logits(made.checkpoint, tmp_path), expected) < 1e-9
        assert made.parameters == made.checkpoint.parameters
        with pytest.raises(UnreachableSize):
            with_maps(desk, parts, [3])


def test_bytes_of_quantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from peers.quantised import quantised

    model = tiny_model("qwen2", dtype=torch.bfloat16, hidden_size=32, intermediate_size=64)
    checkpoint = open_checkpoint(model)
    linears = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    rows = sum(p.shape[0] for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    for bits, scales, off in ((8, 4 * rows, 0.01), (4, 3 * linears // 32, 0.15)):
        result, taken = quantised(checkpoint, bits, lambda name: Path(tempfile.mkdtemp(prefix=name, dir=tmp_path)))
        assert taken == 2 * (checkpoint.parameters - linears) + linears * bits // 8 + scales
        name = "model.layers.0.mlp.up_proj.weight"
        before, after = (c.source.read([name], torch.device("cpu"))[name].double() for c in (checkpoint, result))
        assert 0 < float((after - before).norm() / before.norm()) < off


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    path, head = tmp_path / "a.json", {"checkpoint_sha256": "1", "seed": 0, "data": {}}
    Report(path, head).add({"way": "mix", "asked": 0.5})
    again = Report(path, head)
    assert set(again.rows) == {("mix", 0.5)}
    with pytest.raises(SystemExit):
        Report(path, head | {"seed": 1})
    again.add({"way": "mix", "asked": 0.6})
    again.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert set(Report(path, head).rows) == {("mix", 0.5), ("mix", 0.6)}
