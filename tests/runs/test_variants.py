"""Settings within families that change what a layer is, methods on unusual layers, and types that are not listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import layer_tensors, operate, saved_result
from tiny_families import dtype_of
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
    walked_logits,
    without_layers,
)
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import layer_surgery
from layer_surgery.checkpoint.architectures import ARCHITECTURES, Architecture
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.recognition import architecture_of
from layer_surgery.errors import CheckpointError, PlanError
from layer_surgery.progress import Ui
from layer_surgery.walk.moments import MomentRecorder
from layer_surgery.walk.self_check import check_walk

TOKENS = packed_tokens(3, 12)
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 12}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"multi_query": False, "alibi": True, "parallel_attn": False}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("mpt", {"no_bias": True, "attn_config": {"alibi": False, "clip_qkv": 0.3}}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ("olmo", {"clip_qkv": 0.5}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("gpt2", {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "n_inner": None}),
    ("gptj", {"rotary_dim": 8}),
    ("starcoder2", {"use_bias": False}),
    ("cohere", {"attention_bias": True, "logit_scale": 0.3}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2, "dtype": "float32"} | EXPERTS),
    ("gemma4_text", {"use_double_wide_mlp": True, "final_logit_softcapping": 2.0}),
    ("granitemoehybrid", {"num_local_experts": 0, "position_embedding_type": "rope"}),
    ("lfm2", {"conv_bias": True, "block_auto_adjust_ff_dim": True}),
    ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}),
]


def variant_model(model_type: str, fields: dict[str, Any], layers: int = 6) -> PreTrainedModel:
    dtype = dtype_of(model_type)
    if fields.get("dtype") == "float32":
        dtype = torch.float32
    return tiny_model(model_type, layers=layers, **{"dtype": dtype} | {k: v for k, v in fields.items() if k != "dtype"})


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(TOKENS.token_ids, use_cache=False).logits


@pytest.mark.parametrize(("model_type", "fields"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_variant_walks_and_survives_removal_and_full_rank_factors(
    tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    model = variant_model(model_type, fields)
    path = tiny_checkpoint(tmp_path, model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    tolerance = 1e-9 if model.dtype == torch.float64 else 2e-5
    base = open_checkpoint(path)
    streaming = streamed(base, dtype=model.dtype)
    check_walk(streaming)
    assert largest_difference(walked_logits(streaming, TOKENS, settings(tmp_path)), logits_of(model)) < tolerance
    plan = make_test_plan(6, removed=[0, 3], low_rank={4: full_ranks(base, 4)}, method="svd")
    loaded = layer_surgery.load(saved_result(plan, base, tmp_path / "output", dtype=base.dtype)).eval()
    by_hand = logits_of(without_layers(model, [0, 3]))
    assert largest_difference(logits_of(loaded), by_hand) < 10 * tolerance


@pytest.mark.parametrize("method", ["svd", "grasp", "grasp_sequential", "svd_llm", "fisher"])
def test_every_method_takes_the_transposed_matrices_of_gpt2_the_right_way_round(tmp_path: Path, method: str) -> None:
    """At full rank every method gives the original back; c_attn is [32, 96] as stored and [96, 32] as a matrix."""
    model = tiny_model("gpt2")
    base = open_checkpoint(tiny_checkpoint(tmp_path, model))
    ranks = full_ranks(base, 2)
    assert ranks == {"attn.c_attn": 32, "attn.c_proj": 32, "mlp.c_fc": 32, "mlp.c_proj": 32}
    plan = make_test_plan(4, low_rank={2: ranks}, method=method)
    result = operate(plan, base, tmp_path / "factors", ranks_fixed=True).checkpoint
    assert result.source.specs["transformer.h.2.attn.c_attn.out_factor.weight"].shape == (96, 32)
    assert largest_difference(walked_logits(streamed(result), TOKENS, settings(tmp_path)), logits_of(model)) < 1e-6


@pytest.mark.parametrize("method", ["grasp", "svd_llm", "fisher"])
def test_low_ranks_of_gpt2_approximate_its_matrices(tmp_path: Path, method: str) -> None:
    base = open_checkpoint(tiny_checkpoint(tmp_path, tiny_model("gpt2")))
    ranks = {"mlp.c_fc": 3, "mlp.c_proj": 3}
    plan = make_test_plan(4, low_rank={2: ranks}, method=method)
    factors = layer_tensors(operate(plan, base, tmp_path / "factors", ranks_fixed=True), 2)
    weight = tiny_model("gpt2").get_parameter("transformer.h.2.mlp.c_proj.weight").detach().T  # [out, in]
    product = factors["mlp.c_proj.out_factor.weight"] @ factors["mlp.c_proj.in_factor.weight"]
    assert product.shape == weight.shape
    # No method can be nearer than the best approximation, and none is far from it.
    best = torch.linalg.svdvals(weight)[3:].norm()
    assert best - 1e-9 <= (product - weight).norm() < weight.norm()


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen3_next", "granitemoehybrid"])
def test_fisher_runs_on_layers_with_experts_and_without_attention(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, layers=6, dtype=torch.float32)
    base = open_checkpoint(tiny_checkpoint(tmp_path, model))
    ranks = {index: full_ranks(base, index) for index in (2, 5)}
    plan = make_test_plan(6, low_rank=ranks, method="fisher")
    operated = operate(plan, base, tmp_path, dtype=torch.float32, ranks_fixed=True).checkpoint
    result = streamed(operated, dtype=torch.float32)
    assert largest_difference(walked_logits(result, TOKENS, settings(tmp_path)), logits_of(model)) < 1e-3


@pytest.mark.parametrize("form", ["flat", "heads_last", "heads_first"])
def test_moments_of_a_linear_do_not_depend_on_the_form_of_its_input(form: str) -> None:
    """Padding is left out whether a linear is called with [B, S, D], [B S, D], [B, S, H, D] or [B, H, S, D]."""
    valid = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    given = {
        "flat": x.flatten(0, 1),
        "heads_last": x.unflatten(-1, (2, 3)),
        "heads_first": x.unflatten(-1, (2, 3)).transpose(1, 2),
    }[form]
    linear = torch.nn.Linear(given.shape[-1], 2)
    recorder = MomentRecorder({"linear": linear}, gradients=False)
    with recorder.recording() as moments:
        recorder.start_batch(valid)
        linear(given)
    rows = x[valid].reshape(-1, given.shape[-1])
    torch.testing.assert_close(moments.inputs["linear"], rows.T @ rows)


def test_experts_stay_whole_with_other_methods_and_the_message_says_so(tmp_path: Path) -> None:
    model = tiny_model("mixtral", dtype=torch.float32, vocab_size=300)
    with pytest.raises(PlanError, match=r"what stays whole in these layers \(norms, biases, experts\) .*--keep 0"):
        layer_surgery.compress(model, tmp_path / "output", layers=[1], method="fisher", tokenizer=tiny_tokenizer())


# Types that are not in the table

WITHOUT_DATA: dict[str, Any] = {"eval_data": None, "refit": False}
UNLISTED = {
    "arcee": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
    "nemotron": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
    "xglm": ("model.layers", ("self_attn.out_proj", "fc2")),
    "gpt_bigcode": ("transformer.h", ("attn.c_proj", "mlp.c_proj")),
    "olmoe": ("model.layers", None),
    "mamba": ("backbone.layers", None),
}


def unlisted(model_type: str, layers: int = 4) -> PreTrainedModel:
    fields = {"num_experts": 4, "num_experts_per_tok": 2} if model_type == "olmoe" else {}
    fields |= {"state_size": 4} if model_type == "mamba" else {}
    return tiny_model(model_type, layers=layers, dtype=torch.float32, vocab_size=300, **fields)


@pytest.mark.parametrize("model_type", sorted(UNLISTED))
def test_an_unlisted_type_is_guessed_and_said_to_be(tmp_path: Path, model_type: str) -> None:
    layers, writers = UNLISTED[model_type]
    model = unlisted(model_type)
    guess = architecture_of(model)
    assert (guess.guessed, guess.layers) == (True, layers)
    assert (tuple(group[-1] for group in (guess.attention, guess.mlp)) if guess.linears else None) == writers
    notes: list[str] = []
    options = WITHOUT_DATA | {"layers": [0, 2], "keep": 0, "ui": Ui(note=notes.append)}
    layer_surgery.compress(model, tmp_path / "output", **options)
    said = f"the architecture '{model_type}' is not listed; guessing that its decoder layers are '{layers}' (4 x"
    assert said in notes[0]
    assert ("can be removed but not made low-rank" in notes[0]) == (writers is None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    assert largest_difference(logits_of(loaded), logits_of(without_layers(model, [0, 2]))) < 2e-5
    assert len(decoder_layers(loaded)) == 2


@pytest.mark.parametrize("model_type", [name for name, (_, writers) in UNLISTED.items() if writers is not None])
def test_a_guess_with_linears_is_made_low_rank(tmp_path: Path, model_type: str) -> None:
    model = unlisted(model_type)
    options = WITHOUT_DATA | {"layers": [1], "keep": 0.3, "method": "svd", "tokenizer": tiny_tokenizer()}
    layer_surgery.compress(model, tmp_path / "output", **options)
    checkpoint = open_checkpoint(tmp_path / "output")
    prefix = checkpoint.layer_prefix(1)
    assert set(checkpoint.low_rank) == {f"{prefix}{name}" for name in checkpoint.architecture.linears}
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "output", trust_remote_code=True).eval()
    assert torch.isfinite(logits_of(remote)).all()
    check_walk(streamed(tmp_path / "output", dtype=torch.float32))


def test_a_guess_without_linears_cannot_be_made_low_rank(tmp_path: Path) -> None:
    options = WITHOUT_DATA | {"layers": [1], "keep": 0.5, "tokenizer": tiny_tokenizer()}
    with pytest.raises(PlanError, match=r"no linears that can be made low-rank.*--keep 0"):
        layer_surgery.compress(unlisted("olmoe"), tmp_path / "output", **options)


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "opt", "falcon", "phi", "gptj", "starcoder2", "bloom", "olmo2"]
)
def test_a_guess_of_a_listed_type_is_its_entry(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ARCHITECTURES[model_type]
    monkeypatch.delitem(ARCHITECTURES, model_type)
    guess = open_checkpoint(tiny_model(model_type)).architecture
    assert guess.guessed
    assert (guess.layers, {*guess.attention}, {*guess.mlp}) == (entry.layers, {*entry.attention}, {*entry.mlp})
    assert (guess.attention[-1], guess.mlp[-1]) == (entry.attention[-1], entry.mlp[-1])


@pytest.mark.parametrize("name", ["mlp.wo", "mlp.extra", "somewhere"])
def test_linears_that_cannot_be_told_apart_are_not_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two that may write to the residual stream, and one that is neither attention nor MLP; a third MLP is fine."""
    monkeypatch.delitem(ARCHITECTURES, "llama")
    model = tiny_model()
    parent, _, child = name.rpartition(".")
    for layer in decoder_layers(model):
        layer.get_submodule(parent).add_module(child, torch.nn.Linear(4, 4))
    guess = architecture_of(model)
    assert guess.guessed and guess.layers == "model.layers"
    assert bool(guess.linears) == (name == "mlp.extra")


def test_a_matrix_that_is_no_linear_keeps_all_linears_from_being_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is for, what it does with the other matrices is not known."""
    monkeypatch.delitem(ARCHITECTURES, "llama")
    model = tiny_model()
    assert architecture_of(model).linears
    decoder_layers(model)[2].register_parameter("extra", torch.nn.Parameter(torch.ones(2, 2)))
    assert not architecture_of(model).linears


def test_a_type_that_cannot_be_walked_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=61, **sizes))
    with pytest.raises(CheckpointError, match=r"cannot be run one after another.*'rwkv', of which the layers"):
        layer_surgery.score(model, scorer="random")


def test_entries_say_what_is_guessed() -> None:
    assert not any(entry.guessed for entry in ARCHITECTURES.values())
    assert Architecture(model_type="x").linears[-1] == "mlp.down_proj"


def test_a_kv_cache_budget_is_not_met_by_ranks(tmp_path: Path) -> None:
    """Of a guessed type neither heads nor whole attentions can be cut, and ranks leave the cache as it is."""
    options: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "target_kv_cache": 0.8,
        "no_save": True,
        "eval_data": None,
    }
    with pytest.raises(
        PlanError, match=r"--target-kv-cache 0.8 cannot be reached by cutting .*--target-kv-cache 1.0000"
    ):
        layer_surgery.compress(unlisted("arcee"), samples=8, sequence_length=16, **options)
