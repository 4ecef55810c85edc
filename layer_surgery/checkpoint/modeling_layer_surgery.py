"""Loads a checkpoint whose layers hold low-rank factors, on top of the stock transformers model.

This one file is the same for every architecture. Layer Surgery writes a copy of it beside each checkpoint that has
low-rank layers, so it imports torch and transformers only. `config.json` then holds

    base_model_type   the model_type of the original checkpoint, for example "llama"
    base_config       that architecture's own configuration
    low_rank          {"model.layers.2.self_attn.q_proj": 18, ...}: the rank of every replaced linear
                      (of a whole MLP: the rank of the linear map that stands in its place)
    narrowed          {"model.layers.2.mlp.up_proj": [384, 256], ...}: the size [out, in] of every smaller linear
                      (of the experts of a layer: how many there are, and the width of each; of a router: how many
                      experts it chooses among, and the size of what it reads)

and the model is the stock class of `base_model_type` with those linears replaced before the weights are loaded. What
other tools add beside these fields, as `quantization_config`, is taken for part of the base configuration.
`num_hidden_layers` at the top level of the file is a sentence on purpose: a loader that does not run this file then
stops on it with an error, where it would otherwise fill the replaced weights with random numbers.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5
    from transformers import PretrainedConfig as PreTrainedConfig

MODEL_TYPE = "layer_surgery"
HOW_TO_LOAD = (
    "This is a Layer Surgery checkpoint with low-rank or narrower layers: load it with trust_remote_code=True "
    "or with layer_surgery.load(directory)."
)
CAUSAL_LM, MASKED_LM = "LayerSurgeryForCausalLM", "LayerSurgeryForMaskedLM"
HEADLESS = "LayerSurgeryModel"
#: By the name of an entry point at the end of this file: the auto class that asks for it, and where stock classes are.
MODELS: dict[str, tuple[str, Any]] = {
    HEADLESS: ("AutoModel", MODEL_MAPPING),
    CAUSAL_LM: ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING),
    MASKED_LM: ("AutoModelForMaskedLM", MODEL_FOR_MASKED_LM_MAPPING),
    "LayerSurgeryForSequenceClassification": (
        "AutoModelForSequenceClassification",
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
    "LayerSurgeryForTokenClassification": ("AutoModelForTokenClassification", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}
#: Ends of the names of tensors that quantisers write beside or in the place of weights.
QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape|absmax"
    r"|quant_state\..*|SCB|\w+_blocks)$"
)


def auto_map(base_class: type, head: str) -> dict[str, str]:
    """Return `auto_map` for a checkpoint of this architecture and this head: what can be loaded of it, by auto class.

    An encoder is no causal language model, although transformers has classes for that; nor the other way round.
    """
    encoder = head != CAUSAL_LM and base_class in MODEL_FOR_MASKED_LM_MAPPING
    left_out = CAUSAL_LM if encoder else MASKED_LM
    return {
        "AutoConfig": "modeling_layer_surgery.LayerSurgeryConfig",
        **{
            auto_class: f"modeling_layer_surgery.{name}" for name, (auto_class, _) in MODELS.items() if name != left_out
        },
    }


#: Names of the tensors of a low-rank linear, behind its own: [r, in] and [out, r].
IN_FACTOR, OUT_FACTOR = "in_factor.weight", "out_factor.weight"


#: Fields of `config.json` that are not among those of the base architecture.
TOP_LEVEL = (
    "architectures",
    "auto_map",
    "base_model_type",
    "low_rank",
    "model_type",
    "narrowed",
    "transformers_version",
)


def nested_config(
    fields: dict[str, Any], low_rank: dict[str, int], narrowed: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return what `config.json` holds (see the top of this file).

    Args:
        fields: the configuration of the base architecture.
        low_rank: the rank of every replaced linear.
        narrowed: the size (out, in) of every linear that is smaller than in the base architecture.
    """
    base = {name: value for name, value in fields.items() if name not in TOP_LEVEL}
    # Where tools look for it that read the file and not the configuration.
    quantised = {"quantization_config": base.pop("quantization_config")} if base.get("quantization_config") else {}
    architectures = entry_points(fields.get("architectures"))
    return {
        "architectures": architectures,
        "auto_map": auto_map(type(AutoConfig.for_model(fields["model_type"])), head_of(architectures)),
        "model_type": MODEL_TYPE,
        "num_hidden_layers": HOW_TO_LOAD,
        "base_model_type": fields["model_type"],
        "base_config": base,
        "low_rank": dict(low_rank),
        "narrowed": {name: list(size) for name, size in narrowed.items()},
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
        "transformers_version": fields.get("transformers_version"),
        **quantised,
    }


def entry_points(architectures: list[str] | None) -> list[str]:
    """Return the names in `MODELS` for the classes that a configuration names, stock ones or these."""
    ends = {name.removeprefix("LayerSurgery"): name for name in MODELS if name != HEADLESS}
    found = [
        name if name in MODELS else next((ours for end, ours in ends.items() if name.endswith(end)), "")
        for name in architectures or []
    ]
    # Stock models without a head are called after their architecture alone; of old ones, those with a head end alike.
    headless = any(name.endswith("Model") and not name.endswith("HeadModel") for name in architectures or [])
    return [name for name in found if name] or [HEADLESS if headless else CAUSAL_LM]


def head_of(architectures: list[str] | None) -> str:
    """Return the name in `MODELS` of the model with the head that the weights of a checkpoint have."""
    found = entry_points(architectures)
    return next((name for name in found if name != HEADLESS), found[0])


def base_fields(nested: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the base architecture from what `config.json` holds.

    What tools have added at the top level, as quantisers do, counts for the base architecture.
    """
    own = (*TOP_LEVEL, "base_config", "dtype", "num_hidden_layers")
    return {**nested["base_config"], **{name: value for name, value in nested.items() if name not in own}}


class SmallFactor(nn.Module):
    """A factor of a linear of the smallest ranks, a weight [out, in]; at rank 0 it has no elements.

    Not an `nn.Linear`, because tools quantise every one of these: they fail on one without elements, and with a side of
    1 or 2 they fail or, as bitsandbytes with 8 bits on a CPU, give wrong numbers without a word.
    """

    largest_rank = 2

    def __init__(
        self, in_features: int, out_features: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(out_features, in_features, device=device, dtype=dtype))

    def train(self, mode: bool = True) -> SmallFactor:
        """Take a weight without elements out of what is trained, where loading has put it: DDP waits for its gradient,
        and FSDP2 fails on one."""
        if self.weight.numel() == 0:
            self.weight.requires_grad_(False)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight)


class LowRankLinear(nn.Module):
    """`y = out_factor(in_factor(x)) + bias`: a linear layer of rank r as two bias-free linear layers; r may be 0.

    Shapes: in_factor.weight [r, in], out_factor.weight [out, r], bias [out] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        factor: Any = partial(nn.Linear, bias=False) if rank > SmallFactor.largest_rank else SmallFactor
        self.in_factor = factor(in_features, rank, device=device, dtype=dtype)
        self.out_factor = factor(rank, out_features, device=device, dtype=dtype)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> torch.Tensor:
        """The product of the factors [out, in], for models that use the weight of a linear without calling it (the
        fused kernels of state-space layers do)."""
        product: torch.Tensor = self.out_factor.weight @ self.in_factor.weight
        return product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]; at rank 0 to zeros, as a product in training only: then what stands before has a
        gradient (of zeros), for which DDP waits."""
        y: torch.Tensor
        product = self.rank > 0 or self.training
        y = self.out_factor(self.in_factor(x)) if product else x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def replace_linears(model: nn.Module, ranks: dict[str, int]) -> None:
    """Replace, in place, every linear or MLP named in `ranks` by a `LowRankLinear` of that rank (weights not set)."""
    for name, rank in ranks.items():
        module: Any = model.get_submodule(name)
        first, *others = _linears_in(module) or [None]
        if first is None or (others and name.rpartition(".")[2].isdigit()):
            raise ValueError(f"low_rank names '{name}', which is a {type(module).__name__} and not a linear layer")
        # GPT-2's linear has a weight [in, out].
        out_features, in_features = first.weight.shape[::-1] if isinstance(first, Conv1D) else first.weight.shape
        if first is not module:  # a whole MLP: the map gives as much as the MLP reads
            out_features = in_features
        parent, _, child = name.rpartition(".")
        replacement = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=first is not module or first.bias is not None,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, replacement)


def narrow_experts(experts: Any, number: int, width: int) -> None:
    """Give a layer so many experts of this width, in place; they are one module with three-dimensional parameters.

    Weights are not set. The class says how its parameters lie: see `use_experts_implementation` in transformers.
    """
    before, parts = ("gate_up_proj", 2) if experts.has_gate else ("up_proj", 1)
    down_dim, before_dim = (-2, -1) if experts.is_transposed else (-1, -2)
    dims = {"down_proj": (down_dim, width), before: (before_dim, parts * width)}
    if experts.has_bias:
        dims[f"{before}_bias"] = (-1, parts * width)
    for name, (dim, size) in dims.items():
        old = getattr(experts, name)
        shape = list(old.shape)
        shape[dim] = size
        setattr(experts, name, nn.Parameter(torch.empty(shape, device=old.device, dtype=old.dtype)))
    for name in ("intermediate_dim", "intermediate_size"):
        if hasattr(experts, name):
            setattr(experts, name, width)
    if number != experts.num_experts:
        keep_first(experts, number)


def keep_first(module: Any, number: int) -> None:
    """Leave so many experts in a module all of whose tensors have these along their first dimension: experts, router.

    Weights are not set.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach()[:number].clone()))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, buffer[:number].clone(), persistent=name not in module._non_persistent_buffers_set)
    module.num_experts = number


def narrow_linears(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> None:
    """Replace, in place, every linear named in `sizes` by a plain one of that size (out, in) (weights not set)."""
    for name, (out_features, in_features) in sizes.items():
        linear = model.get_submodule(name)
        if isinstance(getattr(linear, "down_proj", None), nn.Parameter):
            narrow_experts(linear, out_features, in_features)
            continue
        if hasattr(linear, "num_experts"):  # the router
            keep_first(linear, out_features)
            continue
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise ValueError(f"narrowed names '{name}', which is a {type(linear).__name__} and not a linear layer")
        parent, _, child = name.rpartition(".")
        smaller = nn.Linear(
            in_features,
            out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, smaller)


def give_classes_of_their_own(model: nn.Module) -> None:
    """Give every module that holds low-rank linears a class by which of its linears they are.

    vLLM looks at one module of a class and fuses the linears of all modules of that class in the same way. A decoder
    layer itself keeps its class, as tools find the layers by it.
    """
    for name, module in model.named_modules():
        low_rank = tuple(child for child, part in module.named_children() if isinstance(part, LowRankLinear))
        if low_rank and not name.rpartition(".")[2].isdigit():
            module.__class__ = _class_with(type(module), low_rank)  # type: ignore[arg-type]


@cache
def _class_with(base: Any, low_rank: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `base` with its name, the same one for the same names of low-rank linears."""
    return type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})


# Attention that was removed


def free_caches_of_removed_attention(model: nn.Module) -> None:
    """Have every attention whose linears are all of rank 0 leave its keys and values out of the cache.

    What such a module gives does not depend on the tokens (its biases at most), so it needs no past.
    """
    for module in model.modules():
        linears = _linears_in(module)
        removed = linears and all(isinstance(part, LowRankLinear) and part.rank == 0 for part in linears)
        if removed and hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(_without_past, with_kwargs=True)


def _linears_in(module: nn.Module) -> list[Any]:
    """Return the linears in a module; of a low-rank one itself and not its factors."""
    if isinstance(module, (LowRankLinear, nn.Linear, Conv1D)):
        return [module]
    return [linear for child in module.children() for linear in _linears_in(child)]


def _without_past(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run an attention on the current tokens alone, and cache a place-holder [batch, 1, tokens, 1] for them.

    Masks and positions are made from the length of the cache, often that of its first layer, and a cache layer without
    elements counts as empty; so one number a token stays for keys and one for values.
    """
    cache: Any = keywords.get("past_key_values")
    layers = getattr(cache, "layers", None)
    if layers is None or keywords.get("alibi") is not None:  # its biases are as long as the cache
        return None
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if layer is not None and not hasattr(layer, "keys"):
        return None  # a state of fixed size
    states = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
    # Quantised caches divide into groups.
    heads, width_of_keys, width_of_values = 1, getattr(layer, "q_group_size", 1), getattr(layer, "q_group_size", 1)
    if layer is not None and layer.is_initialized and layer.keys.dim() == 4 and layer.keys.shape[-1] > 0:
        # A static cache may have been made beforehand, with the sizes of all layers.
        heads, width_of_keys, width_of_values = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    shape = (*states.shape[:2], heads)
    keys, values = (states.new_zeros(*shape, width).transpose(1, 2) for width in (width_of_keys, width_of_values))
    cache.update(keys, values, module.layer_idx)
    return arguments, {**keywords, "past_key_values": None, "attention_mask": None}


# Tensor parallelism


def plan_with_factors(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Return a tensor-parallel plan by module name, with rules for the factors of low-rank linears before its own.

    Of `W = L R` the large sides are cut: by columns L [out, r] is, and R [r, in] is whole everywhere; by rows R is, and
    what is summed over the devices is of the size of the rank.
    """
    rules: dict[str, str] = {}
    for name, module in model.named_modules():
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        style = plan.get(general, "")
        if _has_cut_factors(module, style):
            by_columns = "colwise" in style
            rules[f"{general}.in_factor"] = "replicate" if by_columns else style
            rules[f"{general}.out_factor"] = style if by_columns else "replicate"
    return {**rules, **plan}


def expanded_plan_with_factors(model: nn.Module, expanded: dict[str, str]) -> dict[str, str]:
    """Return a plan by single module and parameter in which the factors are cut and not the linear that they make."""
    expanded = dict(expanded)
    for name, module in model.named_modules():
        style = expanded.get(name, "")
        if not _has_cut_factors(module, style):
            continue
        del expanded[name]
        if module.bias is None:
            continue
        if style in ("colwise", "packed_colwise"):
            expanded[name] = "local_params"  # adds its part of the bias to its part of the output
        else:
            expanded.pop(f"{name}.bias", None)  # added whole to a whole output
    return expanded


def _has_cut_factors(module: Any, style: str) -> bool:
    """Return whether factors are to be cut; a linear of rank 0 has none, and its zeros are cut like any output."""
    return isinstance(module, LowRankLinear) and module.rank > 0 and ("colwise" in style or "rowwise" in style)


# Configuration and model


class _LayerSurgeryConfigMixin:
    """The part that configurations with low-rank layers have beside their base class."""

    model_type = MODEL_TYPE
    base_class: type[PreTrainedConfig]

    def to_dict(self) -> dict[str, Any]:
        fields = {**super().to_dict(), "model_type": self.base_class.model_type}  # type: ignore[misc]
        return nested_config(fields, self.low_rank, self.narrowed)  # type: ignore[attr-defined]

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return LayerSurgeryConfig.from_dict(config_dict, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle it by its base class: its own is made when it is needed, and pickle finds classes by name only."""
        return _empty_config, (self.base_class,), self.__dict__


_config_classes: dict[type, type] = {}
_model_classes: dict[tuple[type, str], type] = {}


def config_class_for(base_class: type[PreTrainedConfig]) -> type:
    """Return the subclass of `base_class` that carries `low_rank` (made once for each base class)."""
    if base_class not in _config_classes:

        def __init__(
            self: Any,
            *args: Any,
            low_rank: dict[str, int] | None = None,
            narrowed: dict[str, tuple[int, int]] | None = None,
            **kwargs: Any,
        ) -> None:
            base_class.__init__(self, *args, **kwargs)
            self.low_rank = dict(low_rank or {})
            self.narrowed = dict(narrowed or {})
            self.auto_map = auto_map(base_class, head_of(self.architectures))

        _config_classes[base_class] = type(
            "LayerSurgeryConfig",
            (_LayerSurgeryConfigMixin, base_class),
            {"__init__": __init__, "__module__": __name__, "base_class": base_class, "model_type": MODEL_TYPE},
        )
    return _config_classes[base_class]


def _empty_config(base_class: type[PreTrainedConfig]) -> Any:
    config_class: Any = config_class_for(base_class)
    return config_class.__new__(config_class)


class _LayerSurgeryModelMixin:
    """The part that models with low-rank layers have beside their base class."""

    base_class: type[PreTrainedModel]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load the model, and raise `ValueError` for weights that transformers would make up or pass over."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        check_loaded(model, info)
        return (model, info) if output_loading_info else model

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        return expanded_plan_with_factors(self, super()._expand_parallel_plan(plan))  # type: ignore[arg-type, misc]


def model_class_for(config_class: type, name: str = CAUSAL_LM) -> type[PreTrainedModel]:
    """Return the stock class of the base architecture, with its linears replaced after construction.

    Args:
        config_class: what `config_class_for` has returned.
        name: what kind of model, one of `MODELS`.
    """
    if (config_class, name) not in _model_classes:
        auto_class, stock_classes = MODELS[name]
        base_config = config_class.base_class  # type: ignore[attr-defined]
        if base_config not in stock_classes:
            raise ValueError(
                f"transformers has no {auto_class} for {base_config.model_type}, which is the architecture of this "
                "checkpoint; load it with AutoModelForCausalLM or AutoModel."
            )
        base_model: type[PreTrainedModel] = stock_classes[base_config]
        ours = "" if name == HEADLESS else f"{base_model.base_model_prefix}."

        # Its parameters have no annotations: vLLM compares arguments with these as if they were classes.
        def __init__(self, config, *args, **kwargs):  # type: ignore[no-untyped-def]
            base_model.__init__(self, config, *args, **kwargs)
            if isinstance(self.base_model, _LayerSurgeryModelMixin) and self.base_model is not self:
                return  # made by `AutoModel`, see below
            # Names in the configuration are those of the model whose head the weights have.
            head = head_of(config.architectures)
            theirs = f"{MODELS[head][1][base_config].base_model_prefix}."
            renamed = partial(_renamed, theirs=theirs, ours=ours, headless=head == HEADLESS)
            # A linear may be both: narrower first, and then made of factors of that size.
            narrow_linears(self, {renamed(key): size for key, size in config.narrowed.items()})
            replace_linears(self, {renamed(key): rank for key, rank in config.low_rank.items()})
            give_classes_of_their_own(self)
            free_caches_of_removed_attention(self)
            self._tp_plan = plan_with_factors(self, getattr(self, "_tp_plan", None) or {})

        _model_classes[config_class, name] = type(
            name,
            (_LayerSurgeryModelMixin, base_model),
            {
                "__init__": __init__,
                "__module__": __name__,
                "config_class": config_class,
                "_auto_class": auto_class,
            },
        )
        if auto_class not in ("AutoModel", "AutoModelForCausalLM"):
            # Classifiers of most architectures ask `AutoModel` for their decoder, which must not ask for remote code.
            AutoModel.register(config_class, model_class_for(config_class, "LayerSurgeryModel"), exist_ok=True)
    return _model_classes[config_class, name]


def _renamed(name: str, *, theirs: str, ours: str, headless: bool) -> str:
    """Return the name that a module of a checkpoint has in a model whose body stands at `ours` and not at `theirs`."""
    return ours + name.removeprefix(theirs) if headless or name.startswith(theirs) else name


def check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `ValueError` if weights were missing, which transformers fills with random numbers, or had no place.

    A head that the checkpoint does not have is new, and its own may be left out.
    """
    body = f"{model.base_model_prefix}."
    kind, head = type(model).__name__, head_of(model.config.architectures)
    missing = [
        name
        for name in info["missing_keys"]
        if (kind == head and kind != HEADLESS)
        # Encoders have a pooler for some heads only.
        or ((kind == HEADLESS or name.startswith(body)) and not name.removeprefix(body).startswith("pooler."))
    ]
    unexpected = [name for name in info["unexpected_keys"] if kind == head or name.startswith(body)]
    if not missing and not unexpected:
        return
    quantised = next((name for name in unexpected if QUANTISED_NAMES.search(name)), None)
    if quantised is not None and not getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"the weights are quantised (there is '{quantised}'), but config.json has no quantization_config, without "
            "which they would be read as plain numbers; add the one that the quantiser wrote."
        )
    faults = {"are missing": sorted(missing), "have no place in the model": sorted(unexpected)}
    found = [f"{len(names)} {what} (the first is '{names[0]}')" for what, names in faults.items() if names]
    raise ValueError(
        f"the weights are not those that config.json calls for: {' and '.join(found)}; is the download complete, and "
        "do both files belong together?"
    )


class LayerSurgeryConfig(PreTrainedConfig):  # type: ignore[misc]
    """Reads `config.json`; what it returns is a subclass of the base architecture's configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_class = type(AutoConfig.for_model(config_dict["base_model_type"]))
        fields = base_fields(config_dict)
        fields["architectures"] = config_dict.get("architectures")
        fields["low_rank"] = {name: int(rank) for name, rank in config_dict["low_rank"].items()}
        narrowed = config_dict.get("narrowed") or {}  # not in what version 0.1 wrote
        fields["narrowed"] = {name: (int(out), int(in_)) for name, (out, in_) in narrowed.items()}
        # The dtype of the tensors on disk is a fact about the checkpoint, so it is kept outside base_config too.
        fields.setdefault("dtype", config_dict.get("dtype"))
        # The bound method of PreTrainedConfig, on the class that has the base architecture's fields.
        return PreTrainedConfig.from_dict.__func__(config_class_for(base_class), fields, **kwargs)  # type: ignore[attr-defined]


class _EntryPoint(PreTrainedModel):  # type: ignore[misc]
    """Entry point for transformers' auto classes; what it returns is a subclass of the stock model class."""

    config_class = LayerSurgeryConfig
    _supports_attention_backend = True  # vLLM asks before it makes the model, which then answers for itself

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            config = LayerSurgeryConfig.from_pretrained(pretrained_model_name_or_path)
        return model_class_for(type(config), cls.__name__).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs
        )

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class_for(type(config), cls.__name__)._from_config(config, **kwargs)


class LayerSurgeryModel(_EntryPoint):
    """Entry point for `AutoModel`: the model without a head, whose last hidden states other tools take."""


class LayerSurgeryForCausalLM(_EntryPoint):
    """Entry point for `AutoModelForCausalLM`."""


class LayerSurgeryForMaskedLM(_EntryPoint):
    """Entry point for `AutoModelForMaskedLM`."""


class LayerSurgeryForSequenceClassification(_EntryPoint):
    """Entry point for `AutoModelForSequenceClassification`: the head is new unless the checkpoint is a classifier."""


class LayerSurgeryForTokenClassification(_EntryPoint):
    """Entry point for `AutoModelForTokenClassification`: the head is new unless the checkpoint is a tagger."""


__all__ = ["LayerSurgeryConfig", *MODELS, "LowRankLinear", "replace_linears"]
