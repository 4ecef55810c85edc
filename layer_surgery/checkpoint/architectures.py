"""Names of layers and of their linears, for every supported `model_type`.

Nothing else in the package knows a module name of an architecture. Embeddings, position embeddings, masks, final norm
and head need no entry: the walk learns them by running the model itself with stubs in place of its layers.
"""

from dataclasses import dataclass
from typing import Any, Literal

from layer_surgery.records import Part


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Names of the modules that surgery touches; linears are named relative to their decoder layer.

    Layers of one model may differ: a layer has those of the named linears that exist in it. The last one of `attention`
    and of `mlp` that a layer has is the projection that writes to the residual stream.
    """

    model_type: str
    layers: str = "model.layers"  #: Where the list of decoder layers is.
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    fused: Literal["sections", "groups"] | None = None
    """How the first of two attention linears has all queries, keys and values: one after the other, or for one group
    of heads (those with the same keys) after the other. None: there is no such linear, or it is not known."""
    guessed: bool = False  #: Not from the table.

    def linears_of(self, part: Part) -> tuple[str, ...]:
        """Return the linears of a part of a layer, or of all of it."""
        return self.linears if part == "layer" else self.attention if part == "attention" else self.mlp

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer, in the order in which data reaches them."""
        return self.attention + self.mlp


_FUSED_QKV = ("self_attn.qkv_proj", "self_attn.o_proj")
_FUSED_GATE_UP = ("mlp.gate_up_proj", "mlp.down_proj")
_TWO_LAYER_MLP = ("mlp.c_fc", "mlp.c_proj")
_BERT_ATTENTION = ("self.query", "self.key", "self.value")
#: Where positions have projections of their own (pos_key_proj, ...), these read no tokens and stay as they are.
_DEBERTA_ATTENTION = ("self.query_proj", "self.key_proj", "self.value_proj")
_BERT_MLP = ("intermediate.dense", "output.dense")
_SELF_ATTENTION, _GATED_MLP = Architecture.attention, Architecture.mlp
_OPT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_BLOOM_ATTENTION = ("self_attention.query_key_value", "self_attention.dense")
_FOUR_H_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_SHARED_EXPERT = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
_SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")

#: Types whose modules have the names of Llama's.
_NAMES_OF_LLAMA = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
    *("olmo", "olmo2", "olmo3", "granite", "smollm3", "stablelm", "cohere"),
)

#: Every entry has a contract test (tests/test_architectures.py). To add one, add a line here.
ARCHITECTURES: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        *(Architecture(model_type=name) for name in _NAMES_OF_LLAMA),
        Architecture(model_type="starcoder2", mlp=_TWO_LAYER_MLP),
        Architecture(model_type="phi3", attention=_FUSED_QKV, mlp=_FUSED_GATE_UP, fused="sections"),
        Architecture(model_type="glm4", mlp=_FUSED_GATE_UP),
        Architecture(model_type="phi", attention=(*_SELF_ATTENTION[:3], "self_attn.dense"), mlp=("mlp.fc1", "mlp.fc2")),
        # Older families, each with names of its own.
        Architecture(
            model_type="gpt2",
            layers="transformer.h",
            attention=("attn.c_attn", "attn.c_proj"),
            mlp=_TWO_LAYER_MLP,
            fused="sections",
        ),
        Architecture(
            model_type="gpt_neo",
            layers="transformer.h",
            attention=tuple(f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")),
            mlp=_TWO_LAYER_MLP,
        ),
        Architecture(
            model_type="gpt_neox",
            layers="gpt_neox.layers",
            attention=("attention.query_key_value", "attention.dense"),
            mlp=_FOUR_H_MLP,
            fused="groups",
        ),
        Architecture(
            model_type="gptj",
            layers="transformer.h",
            attention=tuple(f"attn.{name}_proj" for name in ("q", "k", "v", "out")),
            mlp=("mlp.fc_in", "mlp.fc_out"),
        ),
        Architecture(model_type="opt", layers="model.decoder.layers", attention=_OPT_ATTENTION, mlp=("fc1", "fc2")),
        Architecture(
            model_type="bloom", layers="transformer.h", attention=_BLOOM_ATTENTION, mlp=_FOUR_H_MLP, fused="groups"
        ),
        Architecture(
            model_type="falcon", layers="transformer.h", attention=_BLOOM_ATTENTION, mlp=_FOUR_H_MLP, fused="groups"
        ),
        Architecture(
            model_type="mpt",
            layers="transformer.blocks",
            attention=("attn.Wqkv", "attn.out_proj"),
            mlp=("ffn.up_proj", "ffn.down_proj"),
            fused="sections",
        ),
        # Mixtures of experts: the experts of a layer are one tensor (`experts.py`); shared experts are linears.
        Architecture(model_type="mixtral", mlp=()),
        Architecture(model_type="gpt_oss", mlp=()),
        Architecture(model_type="qwen2_moe", mlp=_GATED_MLP + _SHARED_EXPERT),
        Architecture(model_type="qwen3_moe"),
        Architecture(
            model_type="deepseek_v3",
            attention=tuple(
                f"self_attn.{name}"
                for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            ),
            mlp=_GATED_MLP + _SHARED_EXPERTS,
        ),
        # Hybrids: some layers have linear attention, a convolution or a state space in the place of attention.
        Architecture(
            model_type="qwen3_next",
            attention=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj", *_SELF_ATTENTION),
            mlp=_GATED_MLP + _SHARED_EXPERT,
        ),
        Architecture(
            model_type="qwen3_5_text",
            attention=(
                *(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
                "linear_attn.out_proj",
                *_SELF_ATTENTION,
            ),
        ),
        Architecture(
            model_type="lfm2",
            attention=("conv.in_proj", "conv.out_proj", *_OPT_ATTENTION),
            mlp=tuple(f"feed_forward.w{number}" for number in (1, 3, 2)),
        ),
        Architecture(
            model_type="granitemoehybrid",
            attention=("mamba.in_proj", "mamba.out_proj", *_SELF_ATTENTION),
            mlp=("shared_mlp.input_linear", "shared_mlp.output_linear"),
        ),
        # Encoders.
        *(
            Architecture(
                model_type=name,
                layers=f"{prefix}.encoder.layer",
                attention=(*(f"attention.{part}" for part in linears), "attention.output.dense"),
                mlp=_BERT_MLP,
            )
            for name, prefix, linears in (
                ("bert", "bert", _BERT_ATTENTION),
                ("roberta", "roberta", _BERT_ATTENTION),
                ("xlm-roberta", "roberta", _BERT_ATTENTION),
                ("electra", "electra", _BERT_ATTENTION),
                ("deberta-v2", "deberta", _DEBERTA_ATTENTION),
            )
        ),
        Architecture(
            model_type="mpnet",
            layers="mpnet.encoder.layer",
            attention=tuple(f"attention.attn.{name}" for name in "qkvo"),
            mlp=_BERT_MLP,
        ),
        Architecture(
            model_type="distilbert",
            layers="distilbert.transformer.layer",
            attention=tuple(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
            mlp=("ffn.lin1", "ffn.lin2"),
        ),
        Architecture(
            model_type="modernbert", attention=("attn.Wqkv", "attn.Wo"), mlp=("mlp.Wi", "mlp.Wo"), fused="sections"
        ),
    )
}


def base_model_type(config: Any) -> str:
    """Return the `model_type` of the stock architecture, also for a checkpoint with low-rank layers."""
    base_class = getattr(config, "base_class", None)
    return str(base_class.model_type if base_class is not None else config.model_type)


def longest_sequence(config: Any) -> int | None:
    """Return how many tokens a model takes at most; None where its configuration does not say."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter: MPT
    return min((int(limit) for limit in limits if limit), default=None)
