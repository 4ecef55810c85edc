"""The contract of every supported architecture: a tiny random model of each goes through the tool and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import operate, saved_result
from tiny_families import DECODERS, FLOAT32_INSIDE, LAYERS, dtype_of
from tiny_models import (
    decoder_layers,
    full_ranks,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_gradients,
    walked_logits,
    whole_gradients,
    without_layers,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import layer_surgery
from layer_surgery.calibration.units import attention_heads, mlp_channels
from layer_surgery.checkpoint.architectures import ARCHITECTURES, Architecture, base_model_type
from layer_surgery.checkpoint.bypass import bypass_of
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.experts import WIDTH_MULTIPLE, experts_of
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.recognition import architecture_of
from layer_surgery.checkpoint.size_fields import size_field
from layer_surgery.checkpoint.tensors import SafetensorsSource, checkpoint_files
from layer_surgery.errors import CheckpointError
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.walk.self_check import check_survivors, check_walk
from layer_surgery.walk.walk import Walk

#: What can be cut in a layer, and the families that have nothing of it: every MLP is made of experts; queries, keys and
#: values are one matrix, or the attention knows how many heads it has, or has something that goes by the head.
UNITS = {"channels": mlp_channels, "heads": attention_heads}
WITHOUT = {
    "channels": ("gpt_oss", "mixtral"),
    "heads": (
        *("bloom", "cohere", "deepseek_v3", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "mpt", "olmo2"),
        *("olmo3", "opt", "phi3", "qwen3_5_text", "qwen3_next", "stablelm"),
    ),
}
#: Layer 0 and another, so that what is left is renumbered and does not follow the pattern.
REMOVED = [0, 3]
TOKENS = packed_tokens(3, 12)
#: Matrices that are kept whole: routers and gates.
KEPT_WHOLE = ("mlp.shared_expert_gate", "mlp.gate", "mlp.router", "block_sparse_moe.router")


@dataclass
class Family:
    """A tiny random model of one family, and its checkpoint."""

    model_type: str
    model: PreTrainedModel
    path: Path

    def __post_init__(self) -> None:
        self.entry: Architecture = ARCHITECTURES[self.model_type]
        self.layers: nn.ModuleList = decoder_layers(self.model)
        self.tolerance = 1e-9 if self.model.dtype == torch.float64 else 2e-5

    def ranks(self, index: int, rank: int = 3) -> dict[str, int]:
        present = dict(self.layers[index].named_modules())
        return {name: rank for name in self.entry.linears if name in present}


def family_of(model_type: str, directory: Path, *, tied: bool) -> Family:
    made = tiny_model(model_type, layers=LAYERS.get(model_type, 5), dtype=dtype_of(model_type), tied=tied)
    path = tiny_checkpoint(directory, made, max_shard_size="60KB")
    return Family(model_type, load_stock(path)[0], path)


@pytest.fixture(scope="module", params=DECODERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family_of(request.param, tmp_path_factory.mktemp(request.param), tied=False)


@pytest.fixture(scope="module")
def plain(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's model without two layers, saved."""
    plan = make_test_plan(len(family.layers), removed=REMOVED, method="remove")
    return save_operated(plan, family.path, tmp_path_factory.mktemp("plain") / "output")


@pytest.fixture(scope="module")
def low_rank(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's model with one layer removed and one low-rank, saved."""
    plan = make_test_plan(len(family.layers), removed=[0], low_rank={3: family.ranks(3)}, method="svd")
    return save_operated(plan, family.path, tmp_path_factory.mktemp("low_rank") / "output")


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(TOKENS.token_ids, use_cache=False).logits


def save_operated(plan: SurgeryPlan, path: Path, output: Path) -> Path:
    """Carry out a plan in the checkpoint's own dtype, save the result into `output` and return it."""
    base = open_checkpoint(path)
    return saved_result(plan, base, output, dtype=base.dtype)


def load_stock(directory: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True, **options)
    return model.eval(), info


def kinds_of(layers: nn.ModuleList, config: Any) -> list[Any]:
    """Tell layers apart by their modules and by what the configuration says of each."""
    said = [getattr(config, name, None) or [""] * len(layers) for name in ("layer_types", "no_rope_layers")]
    said.append(getattr(config, "attention_layers", None) or [""] * len(layers))
    modules = [tuple((name, type(module).__name__) for name, module in layer.named_modules()) for layer in layers]
    return list(zip(modules, *said, strict=True))


def generated(model: PreTrainedModel) -> list[list[list[int]]]:
    """Return eight greedy tokens, with and without cache."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False}
    return [model.generate(TOKENS.token_ids[:1, :4], use_cache=cached, **options).tolist() for cached in (True, False)]


# The contract


def test_the_test_model_has_every_kind_of_layer_of_its_family(family: Family) -> None:
    kinds = kinds_of(family.layers, family.model.config)
    if family.model_type in LAYERS:
        assert len(set(kinds)) >= 2
        survivors = [kind for index, kind in enumerate(kinds) if index not in REMOVED]
        assert survivors != kinds[: len(survivors)], "removal leaves the pattern as it was; remove other layers"


def test_streamed_logits_equal_the_models_own(family: Family, tmp_path: Path) -> None:
    from_disk = streamed(family.path, dtype=family.model.dtype, resident_bytes=0)
    check_walk(from_disk)
    for model in (from_disk, streamed(family.model, dtype=family.model.dtype)):
        logits = walked_logits(model, TOKENS, settings(tmp_path))
        assert largest_difference(logits, logits_of(family.model)) < family.tolerance


def test_weight_gradients_equal_the_models_own(family: Family, tmp_path: Path) -> None:
    expected = whole_gradients(family.model, TOKENS)
    with Walk(streamed(family.model, dtype=family.model.dtype), TOKENS, settings(tmp_path)) as walk:
        gradients = walked_gradients(walk)
    tolerance = 2e-5 if family.model_type in FLOAT32_INSIDE else 10 * family.tolerance
    # Not the norms: some families multiply by their weights in float32, also in a float64 model.
    compared = 0
    for index, layer in enumerate(family.layers):
        for name in family.ranks(index):
            key = f"{family.entry.layers}.{index}.{name}.weight"
            theirs = expected[key].T if isinstance(layer.get_submodule(name), Conv1D) else expected[key]
            assert float((gradients[key] - theirs).abs().max() / theirs.abs().max()) < tolerance, key
            compared += 1
    assert compared >= len(family.layers)


def test_the_named_linears_are_all_the_matrices_of_every_layer(family: Family) -> None:
    assert len(family.layers) == family.model.config.num_hidden_layers
    named = set()
    for layer in family.layers:
        linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        assert linears - {*KEPT_WHOLE} == {name for name in family.entry.linears if name in linears}
        matrices = {name for name, parameter in layer.named_parameters() if parameter.dim() == 2}
        norms = {name for name in matrices if "norm" in name}  # cohere has a norm of its own for each head
        experts = {name for name in matrices if ".experts." in name or name.rpartition(".")[0] in KEPT_WHOLE}
        assert matrices - norms - experts == {f"{name}.weight" for name in linears - {*KEPT_WHOLE}}
        named |= linears
    # DeepSeek's q_proj is there in models without a low-rank query.
    assert {*family.entry.linears} - named <= {"self_attn.q_proj"}


@torch.no_grad()
def test_the_last_of_each_group_writes_to_the_residual_stream(family: Family) -> None:
    """With these projections (and experts) at zero, a layer is the identity."""
    layers = list(decoder_layers(load_stock(family.path)[0]))
    for layer in layers:
        present = dict(layer.named_modules())
        for group in (family.entry.attention, family.entry.mlp):
            last = [name for name in group if name in present][-1:]
            for parameter in [p for name in last for p in present[name].parameters()]:
                parameter.zero_()
        for name, parameter in layer.named_parameters():
            if ".experts." in name:
                parameter.zero_()
    model = streamed(family.model, dtype=family.model.dtype)
    with Walk(model, TOKENS, settings(family.path.parent)) as walk:
        hidden = walk.rehearsal.embed(TOKENS.token_ids)
        for index, layer in enumerate(layers):
            after = walk.rehearsal.call(index, TOKENS.token_ids)(layer, hidden)
            scale = getattr(layer, "layer_scalar", 1.0)
            assert largest_difference(after, hidden * scale) < 1e-6, index


def test_a_model_without_two_layers_loads_in_stock_transformers_and_is_the_original_without_them(
    family: Family, plain: Path
) -> None:
    loaded, info = load_stock(plain)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(family.model)
    assert {p.dtype for p in loaded.parameters()} == {family.model.dtype}
    assert largest_difference(logits_of(loaded), logits_of(without_layers(family.model, REMOVED))) < family.tolerance
    assert largest_difference(logits_of(loaded), logits_of(family.model)) > 1e-2, "the removed layers did nothing"
    kept = [kind for i, kind in enumerate(kinds_of(family.layers, family.model.config)) if i not in REMOVED]
    assert kinds_of(decoder_layers(loaded), loaded.config) == kept


def test_what_is_saved_has_the_names_that_transformers_saves(family: Family, plain: Path, tmp_path: Path) -> None:
    by_hand = without_layers(family.model, REMOVED)
    names = revert_weight_conversion(by_hand, by_hand.state_dict()).keys()  # what `save_pretrained` writes
    assert stored_names(plain) == {*names}
    load_stock(plain)[0].save_pretrained(tmp_path / "again")
    assert open_checkpoint(plain).sha256() == open_checkpoint(tmp_path / "again").sha256()


def stored_names(directory: Path) -> set[str]:
    return set(SafetensorsSource(checkpoint_files(directory)).specs)


def test_the_saved_configuration_is_json_that_every_reader_takes(plain: Path, low_rank: Path) -> None:
    """Python would write and read `Infinity`, which is not JSON (Granite's hybrids have one)."""
    for directory in (plain, low_rank):
        json.loads((directory / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_surviving_layers_stay_what_they_are(family: Family, tmp_path: Path) -> None:
    base = open_checkpoint(family.path)
    plan = make_test_plan(base.layer_count, removed=REMOVED, method="remove")
    result = operate(plan, base, tmp_path, dtype=base.dtype).checkpoint
    models = [streamed(checkpoint, dtype=base.dtype) for checkpoint in (base, result)]
    check_survivors(models[0], models[1], plan.surviving)


def test_a_model_without_two_layers_generates_with_its_cache_as_without(plain: Path) -> None:
    texts = generated(load_stock(plain)[0])
    assert len(texts[0][0]) == 12
    assert texts[0] == texts[1]


def test_low_rank_and_removed_layers_together_equal_a_model_made_by_hand(family: Family, low_rank: Path) -> None:
    loaded = layer_surgery.load(low_rank).eval()
    by_hand = load_stock(family.path)[0]
    with torch.no_grad():
        for name, rank in family.ranks(3).items():
            weight = decoder_layers(by_hand)[3].get_parameter(f"{name}.weight")
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])
    assert largest_difference(logits_of(loaded), logits_of(without_layers(by_hand, [0]))) < 10 * family.tolerance


def test_a_low_rank_model_loads_as_remote_code_streams_as_it_loads_and_generates(
    family: Family, low_rank: Path, tmp_path: Path
) -> None:
    loaded = layer_surgery.load(low_rank).eval()
    remote, info = load_stock(low_rank, trust_remote_code=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert largest_difference(logits_of(remote), logits_of(loaded)) < family.tolerance
    logits = walked_logits(streamed(low_rank, dtype=family.model.dtype, resident_bytes=0), TOKENS, settings(tmp_path))
    assert largest_difference(logits, logits_of(loaded)) < family.tolerance
    texts = generated(loaded)
    assert texts[0] == texts[1]


def test_a_low_rank_model_does_not_load_as_something_else(family: Family, low_rank: Path) -> None:
    for loader in (AutoModelForCausalLM, type(family.model)):
        options = {"trust_remote_code": False} if loader is AutoModelForCausalLM else {}
        with pytest.raises(Exception, match=r"trust_remote_code|Layer Surgery|cannot be interpreted as an integer"):
            loader.from_pretrained(low_rank, **options)


#: In all others input and output embeddings can be the same tensor.
@pytest.mark.parametrize("model_type", sorted({*DECODERS} - {"gptj"}))
def test_tied_embeddings_stay_tied(tmp_path: Path, model_type: str) -> None:
    family = family_of(model_type, tmp_path, tied=True)
    count, model = len(family.layers), family.model
    base = open_checkpoint(family.path)
    plan = make_test_plan(count, removed=REMOVED, low_rank={count - 1: full_ranks(base, count - 1)}, method="svd")
    loaded = layer_surgery.load(save_operated(plan, family.path, tmp_path / "output")).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not any(p.is_meta for p in loaded.parameters())
    expected = logits_of(without_layers(model, REMOVED))
    assert largest_difference(logits_of(loaded), expected) < 10 * family.tolerance


def test_a_checkpoint_that_leaves_out_what_follows_from_a_pattern_is_cut_rightly(
    family: Family, tmp_path: Path
) -> None:
    """Older checkpoints do not write their per-layer lists; they follow from the number of the layer."""
    fields = json.loads((family.path / "config.json").read_text())
    left_out = [name for name in ("layer_types", "no_rope_layers", "attention_layers") if fields.pop(name, None)]
    if not left_out or family.model_type in ("lfm2", "granitemoehybrid"):
        pytest.skip("no list follows from a pattern")
    path = tmp_path / "model"
    path.mkdir()
    for file in family.path.iterdir():
        (path / file.name).symlink_to(file)
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(fields))
    plan = make_test_plan(len(family.layers), removed=REMOVED, method="remove")
    loaded, _ = load_stock(save_operated(plan, path, tmp_path / "output"))
    assert largest_difference(logits_of(loaded), logits_of(without_layers(family.model, REMOVED))) < family.tolerance


# The table


def test_every_entry_is_filed_under_its_model_type() -> None:
    assert all(entry.model_type == name for name, entry in ARCHITECTURES.items())


def test_a_low_rank_model_has_the_architecture_of_its_base(tmp_path: Path) -> None:
    plan = make_test_plan(4, low_rank={1: {"mlp.up_proj": 2}}, method="svd")
    output = save_operated(plan, tiny_checkpoint(tmp_path), tmp_path / "output")
    checkpoint = open_checkpoint(output)
    assert base_model_type(checkpoint.config) == "llama"
    assert architecture_of(checkpoint.skeleton) is ARCHITECTURES["llama"]


# Fewer channels, fewer heads


def matrix(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Return the weight [out, in] of a linear, however it is stored."""
    linear = model.get_submodule(name)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


@torch.no_grad()
@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_a_layer_with_fewer_units_is_the_same_with_the_others_at_zero(
    family: Family, kind: str, tmp_path: Path
) -> None:
    base, units_of = open_checkpoint(family.path), UNITS[kind]
    found = [units_of(layer, base.architecture) for layer in base.layers]
    index, units = next(((i, units) for i, units in enumerate(found) if units and units.count > 1), (0, None))
    assert (units is None) == (family.model_type in WITHOUT[kind])
    if units is None:
        return
    layers = [LayerPlan(index=i, action="keep") for i in range(base.layer_count)]
    layers[index] = LayerPlan(index=index, action="reduce", **{kind: units.count // 2})
    plan = SurgeryPlan(method="mix", target_layers=base.layer_count - 1, layers=layers)
    output = saved_result(plan, base, tmp_path / "output", tokens=TOKENS, dtype=base.dtype, ranks_fixed=True)
    narrow, info = load_stock(output, trust_remote_code=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    wide, _ = load_stock(family.path)
    layer = f"{family.entry.layers}.{index}"
    first = f"{layer}.{next(iter(units.feeding))}"
    half, all_of_them = units.count // 2 * units.size, units.count * units.size
    same = (matrix(narrow, first)[:half, None] == matrix(wide, first)[:all_of_them]).all(dim=-1)
    assert (same.sum(dim=1) == 1).all()
    kept = same.float().argmax(dim=1)
    assert kept.tolist() == sorted(set(kept.tolist()))  # the order in which the output projection has its columns
    prefix = f"{layer}.{units.output}"
    small = narrow.get_submodule(prefix).weight
    assert tuple(small.shape) == (base.layers[index].get_submodule(units.output).weight.shape[0], len(kept))
    transposed = matrix(wide, prefix)
    transposed.zero_()
    transposed[:, kept] = small
    assert largest_difference(logits_of(narrow), logits_of(wide)) < family.tolerance
    assert largest_difference(logits_of(narrow), logits_of(family.model)) > 100 * family.tolerance
    assert sum(p.numel() for p in narrow.parameters()) == open_checkpoint(output).parameters
    gone = units.count - units.count // 2
    assert base.parameters - open_checkpoint(output).parameters == units.price * gone
    dense = tmp_path / "dense"
    layer_surgery.export_dense(output, dense)
    plain, info = load_stock(dense)
    assert type(plain) is type(wide) and not info["missing_keys"] and not info["unexpected_keys"]
    assert largest_difference(logits_of(plain), logits_of(narrow)) < family.tolerance


#: Families whose models have experts.
WITH_EXPERTS = ("deepseek_v3", "gpt_oss", "granitemoehybrid", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next")


def rows_of_channels(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Return what each expert has before its output projection for each channel [E, I, n]."""
    layer, _, module = name.partition(".mlp.") if ".mlp." in name else name.rpartition(".")
    experts = experts_of(model.get_submodule(layer))
    assert experts is not None and name.endswith(module)
    found = [
        experts.only(model.get_submodule(name), torch.full((experts.number, 1), channel))[experts.before].flatten(1)
        for channel in range(experts.count)
    ]
    return torch.stack(found, dim=1)


@torch.no_grad()
def test_experts_with_fewer_channels_are_the_same_with_the_others_at_zero(family: Family, tmp_path: Path) -> None:
    base = open_checkpoint(family.path)
    each = [experts_of(layer) for layer in base.layers]
    index, experts = next(((i, found) for i, found in enumerate(each) if found is not None), (0, None))
    assert (experts is not None) == (family.model_type in WITH_EXPERTS)
    if experts is None:
        return
    width = experts.count // 2 // WIDTH_MULTIPLE * WIDTH_MULTIPLE or WIDTH_MULTIPLE
    layers = [LayerPlan(index=i, action="keep") for i in range(base.layer_count)]
    layers[index] = LayerPlan(index=index, action="reduce", experts=width)
    plan = SurgeryPlan(method="mix", target_layers=base.layer_count - 1, layers=layers)
    output = saved_result(plan, base, tmp_path / "output", tokens=TOKENS, dtype=base.dtype, ranks_fixed=True)
    narrow, info = load_stock(output, trust_remote_code=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    name = f"{family.entry.layers}.{index}.{experts.module}"
    small = experts.down(narrow.get_submodule(name))
    assert small.shape == (experts.number, experts.hidden, width)
    wide, _ = load_stock(family.path)
    same = (rows_of_channels(narrow, name)[:, :, None] == rows_of_channels(wide, name)[:, None]).all(dim=-1)
    assert (same.sum(dim=2) == 1).all()
    kept = same.float().argmax(dim=2)
    assert kept.shape == (experts.number, width) and torch.equal(kept, kept.sort(dim=1).values)
    down = experts.down(wide.get_submodule(name))
    down.zero_()
    for expert in range(experts.number):
        down[expert][:, kept[expert]] = small[expert]
    assert largest_difference(logits_of(narrow), logits_of(wide)) < family.tolerance
    assert largest_difference(logits_of(narrow), logits_of(family.model)) > 100 * family.tolerance
    assert sum(p.numel() for p in narrow.parameters()) == open_checkpoint(output).parameters
    assert base.parameters - open_checkpoint(output).parameters == experts.price * (experts.count - width)
    streamed_logits = walked_logits(streamed(output, dtype=base.dtype), TOKENS, settings(tmp_path))
    assert largest_difference(streamed_logits, logits_of(narrow)) < family.tolerance
    texts = generated(narrow)
    assert texts[0] == texts[1]
    plain, info = load_stock(Path(str(layer_surgery.export_dense(output, tmp_path / "dense").output)))
    assert type(plain) is type(wide) and not info["missing_keys"] and not info["unexpected_keys"]
    assert largest_difference(logits_of(plain), logits_of(narrow)) < family.tolerance
    narrow.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(output)


#: Families whose MLP is no module of its own, is called with more than the stream, or is made of experts.
WITHOUT_BYPASS = ("bloom", "gpt_oss", "mixtral", "mpt", "opt")


@torch.no_grad()
def test_a_linear_map_takes_the_place_of_an_mlp(family: Family, tmp_path: Path) -> None:
    base = open_checkpoint(family.path)
    found = [bypass_of(layer, base.architecture) for layer in base.layers]
    index, bypass = next(((i, each) for i, each in enumerate(found) if each is not None), (0, None))
    assert (bypass is None) == (family.model_type in WITHOUT_BYPASS)
    if bypass is None:
        return
    layers = [LayerPlan(index=i, action="keep") for i in range(base.layer_count)]
    layers[index] = LayerPlan(index=index, action="reduce", bypass=3)
    plan = SurgeryPlan(method="mix", target_layers=base.layer_count - 1, layers=layers)
    output = saved_result(plan, base, tmp_path / "output", tokens=TOKENS, dtype=base.dtype, ranks_fixed=True, maps=True)
    result, info = load_stock(output, trust_remote_code=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    name = f"{family.entry.layers}.{index}.{bypass.module}"
    left, right, bias = (result.get_parameter(f"{name}.{each}") for each in (OUT_FACTOR, IN_FACTOR, "bias"))
    assert left.shape == (bypass.hidden, 3) and right.shape == (3, bypass.hidden)
    original, _ = load_stock(family.path)
    original.get_submodule(name).register_forward_hook(lambda _m, inputs, _o: inputs[0] @ right.T @ left.T + bias)
    assert largest_difference(logits_of(result), logits_of(original)) < family.tolerance
    assert largest_difference(logits_of(result), logits_of(family.model)) > 100 * family.tolerance
    saved = open_checkpoint(output)
    assert sum(p.numel() for p in result.parameters()) == saved.parameters
    assert base.parameters - saved.parameters == bypass.parameters - bypass.price(3)
    streamed_logits = walked_logits(streamed(output, dtype=base.dtype), TOKENS, settings(tmp_path))
    assert largest_difference(streamed_logits, logits_of(result)) < family.tolerance
    texts = generated(result)
    assert texts[0] == texts[1]
    result.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(output)
    with pytest.raises(CheckpointError, match=r"1 MLPs \(the first is .* bypassed by a linear map"):
        layer_surgery.export_dense(output, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


#: Families with experts whose router is known, so that whole ones can go (DeepSeek's chooses groups of them first).
WITH_ROUTED = tuple(name for name in WITH_EXPERTS if name != "deepseek_v3")


def smaller_stock(family: Family, base: Checkpoint, name: str, number: int) -> PreTrainedModel:
    """Return the stock model with so many experts in every layer, weights not set."""
    fields = base.config_fields | {name: number}
    return type(family.model)(type(base.config).from_dict(fields)).to(family.model.dtype).eval()


@torch.no_grad()
def test_fewer_experts_are_the_stock_model_with_fewer(family: Family, tmp_path: Path) -> None:
    base = open_checkpoint(family.path)
    each = {i: found for i, layer in enumerate(base.layers) if (found := experts_of(layer)) is not None}
    assert bool(each and next(iter(each.values())).router) == (family.model_type in WITH_ROUTED)
    if family.model_type not in WITH_ROUTED:
        return
    field, number = size_field(base, "routed"), 3
    assert field is not None
    small = smaller_stock(family, base, field, number)
    for cut, name in (([min(each)], "one"), (list(each), "all")):
        layers = [LayerPlan(index=i, action="keep") for i in range(base.layer_count)]
        for index in cut:
            layers[index] = LayerPlan(index=index, action="reduce", routed=number)
        plan = SurgeryPlan(method="mix", target_layers=base.layer_count - len(cut), layers=layers)
        output = saved_result(plan, base, tmp_path / name / "output", tokens=TOKENS, dtype=base.dtype, ranks_fixed=True)
        plain = cut == list(each)  # one number in all layers: the field says it
        result, info = load_stock(output, trust_remote_code=not plain)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert not plain or (type(result) is type(family.model) and getattr(result.config, field) == number)
        # The original, in whose place of a layer's experts and router those of a smaller stock model are put.
        expected, _ = load_stock(family.path)
        for index in cut:
            place, found = f"{family.entry.layers}.{index}", each[index]
            for module in (found.module, found.router):
                old, new = (model.get_submodule(f"{place}.{module}") for model in (expected, small))
                theirs = result.get_submodule(f"{place}.{module}").state_dict()
                # Which of the original's experts they are, by their matrices (biases may be all alike).
                rows = {
                    name: [old.state_dict()[name].flatten(1).tolist().index(row) for row in tensor.flatten(1).tolist()]
                    for name, tensor in theirs.items()
                    if tensor.dim() > 1 and "bias" not in name
                }
                kept = next(iter(rows.values()))
                assert kept == sorted(set(kept)) and all(each_kept == kept for each_kept in rows.values())
                new.load_state_dict({k: v[kept] for k, v in old.state_dict().items()})
                parent, _, child = f"{place}.{module}".rpartition(".")
                setattr(expected.get_submodule(parent), child, new)
        assert largest_difference(logits_of(result), logits_of(expected)) < family.tolerance
        assert largest_difference(logits_of(result), logits_of(family.model)) > 100 * family.tolerance
        saved, gone = open_checkpoint(output), sum(4 - number for _ in cut)
        assert base.parameters - saved.parameters == gone * each[cut[0]].price_of_one
        streamed_logits = walked_logits(streamed(output, dtype=base.dtype), TOKENS, settings(tmp_path))
        assert largest_difference(streamed_logits, logits_of(result)) < family.tolerance
        texts = generated(result)
        assert texts[0] == texts[1]
        result.save_pretrained(tmp_path / name / "again")
        assert stored_names(tmp_path / name / "again") == stored_names(output)
        if not plain:
            with pytest.raises(CheckpointError, match="fewer experts"):
                layer_surgery.export_dense(output, tmp_path / "dense")
