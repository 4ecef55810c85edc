"""Loads a checkpoint whose layers hold low-rank factors, on top of the stock transformers model.

This one file is the same for every architecture. Layer Surgery writes a copy of it beside each checkpoint that has
low-rank layers, so it imports torch and transformers only. `config.json` then holds

    base_model_type   the model_type of the original checkpoint, for example "llama"
    base_config       that architecture's own configuration
    low_rank          {"model.layers.2.self_attn.q_proj": 18, ...}: the rank of every replaced linear

and the model is the stock class of `base_model_type` with those linears replaced before the weights are loaded.
`num_hidden_layers` at the top level of the file is a sentence on purpose: a loader that does not run this file then
stops on it with an error, where it would otherwise fill the replaced weights with random numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "layer_surgery"
HOW_TO_LOAD = (
    "This is a Layer Surgery checkpoint with low-rank layers: load it with trust_remote_code=True "
    "or with layer_surgery.load(directory)."
)
AUTO_MAP = {
    "AutoConfig": "modeling_layer_surgery.LayerSurgeryConfig",
    "AutoModelForCausalLM": "modeling_layer_surgery.LayerSurgeryForCausalLM",
}


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rank 0 has no elements to initialise
            self.in_factor = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            self.out_factor = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
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
        """Map [..., in] to [..., out]."""
        y: torch.Tensor = self.out_factor(self.in_factor(x))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def replace_linears(model: nn.Module, ranks: dict[str, int]) -> None:
    """Replace, in place, every linear named in `ranks` by a `LowRankLinear` of that rank (weights not set)."""
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        if isinstance(linear, Conv1D):  # GPT-2's linear, whose weight is [in, out]
            in_features, out_features = linear.weight.shape
        elif isinstance(linear, nn.Linear):
            out_features, in_features = linear.weight.shape
        else:
            raise ValueError(f"low_rank names '{name}', which is a {type(linear).__name__} and not a linear layer")
        parent, _, child = name.rpartition(".")
        replacement = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, replacement)


class _LayerSurgeryConfigMixin:
    """What every configuration with low-rank layers has beside the fields of its base class."""

    model_type = MODEL_TYPE
    base_class: type[PreTrainedConfig]

    def to_dict(self) -> dict[str, Any]:
        """Return the nested form that `config.json` has (see the top of this file)."""
        base = super().to_dict()  # type: ignore[misc]
        own = ("low_rank", "auto_map", "base_model_type", "model_type", "architectures", "transformers_version")
        return {
            "architectures": ["LayerSurgeryForCausalLM"],
            "auto_map": dict(AUTO_MAP),
            "model_type": MODEL_TYPE,
            "num_hidden_layers": HOW_TO_LOAD,
            "base_model_type": self.base_class.model_type,
            "base_config": {key: value for key, value in base.items() if key not in own},
            "low_rank": dict(self.low_rank),  # type: ignore[attr-defined]
            "dtype": base.get("dtype"),
            "transformers_version": base.get("transformers_version"),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return LayerSurgeryConfig.from_dict(config_dict, **kwargs)


_config_classes: dict[type, type] = {}
_model_classes: dict[type, type] = {}


def config_class_for(base_class: type[PreTrainedConfig]) -> type:
    """Return the subclass of `base_class` that carries `low_rank` (made once for each base class)."""
    if base_class not in _config_classes:

        def __init__(self: Any, *args: Any, low_rank: dict[str, int] | None = None, **kwargs: Any) -> None:
            base_class.__init__(self, *args, **kwargs)
            self.low_rank = dict(low_rank or {})
            self.auto_map = dict(AUTO_MAP)

        _config_classes[base_class] = type(
            "LayerSurgeryConfig",
            (_LayerSurgeryConfigMixin, base_class),
            {"__init__": __init__, "__module__": __name__, "base_class": base_class, "model_type": MODEL_TYPE},
        )
    return _config_classes[base_class]


def model_class_for(config_class: type) -> type[PreTrainedModel]:
    """Return the stock causal-LM class of the base architecture, with its linears replaced after construction."""
    if config_class not in _model_classes:
        base_model: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[config_class.base_class]  # type: ignore[attr-defined]

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base_model.__init__(self, config, *args, **kwargs)
            replace_linears(self, config.low_rank)

        _model_classes[config_class] = type(
            "LayerSurgeryForCausalLM",
            (base_model,),
            {
                "__init__": __init__,
                "__module__": __name__,
                "config_class": config_class,
                "_auto_class": "AutoModelForCausalLM",
            },
        )
    return _model_classes[config_class]


class LayerSurgeryConfig(PreTrainedConfig):  # type: ignore[misc]
    """Reads `config.json`; what it returns is a subclass of the base architecture's configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_class = type(AutoConfig.for_model(config_dict["base_model_type"]))
        fields = dict(config_dict["base_config"])
        fields["low_rank"] = {name: int(rank) for name, rank in config_dict["low_rank"].items()}
        # The dtype of the tensors on disk is a fact about the checkpoint, so it is kept outside base_config too.
        fields.setdefault("dtype", config_dict.get("dtype"))
        # The bound method of PreTrainedConfig, on the class that has the base architecture's fields.
        return PreTrainedConfig.from_dict.__func__(config_class_for(base_class), fields, **kwargs)  # type: ignore[attr-defined]


class LayerSurgeryForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Entry point for transformers' auto classes; what it returns is a subclass of the stock model class."""

    config_class = LayerSurgeryConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            config = LayerSurgeryConfig.from_pretrained(pretrained_model_name_or_path)
        return model_class_for(type(config)).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs
        )

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class_for(type(config))._from_config(config, **kwargs)


__all__ = ["LayerSurgeryConfig", "LayerSurgeryForCausalLM", "LowRankLinear", "replace_linears"]
