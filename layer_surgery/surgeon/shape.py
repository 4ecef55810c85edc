"""The sizes of a checkpoint that planning needs."""

from layer_surgery.calibration.units import attention_heads, mlp_channels
from layer_surgery.checkpoint.bypass import bypass_of
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.records import Part
from layer_surgery.surgeon.plan import LayerShape, ModelShape


def model_shape(checkpoint: Checkpoint, part: Part = "layer") -> ModelShape:
    """Return the sizes that planning needs, of all layers or of a part of each.

    Linears that are low-rank already cannot be replaced again.
    """
    layers = []
    for index in range(checkpoint.layer_count):
        prefix = checkpoint.layer_prefix(index)
        linears = {}
        for name in checkpoint.architecture.linears_of(part):
            spec = checkpoint.source.specs.get(f"{prefix}{name}.weight")
            if spec is not None:
                linears[name] = (spec.shape[0], spec.shape[1])
        parameters = checkpoint.layer_parameters(index)
        if part != "layer":
            parameters = sum(
                p.numel() for name in linears for p in checkpoint.layers[index].get_submodule(name).parameters()
            )
        layer, names = checkpoint.layers[index], checkpoint.architecture
        channels = mlp_channels(layer, names) if part != "attention" else None
        heads = attention_heads(layer, names) if part != "mlp" else None
        experts = experts_of(layer) if part == "layer" else None  # of a part, linears are counted and nothing else
        bypass = bypass_of(layer, names) if part == "layer" else None
        layers.append(
            LayerShape(
                linears=linears,
                parameters=parameters,
                channels=channels,
                heads=heads,
                experts=experts,
                bypass=bypass,
            )
        )
    return ModelShape(
        layers=layers,
        parameters=checkpoint.parameters,
        hidden_size=checkpoint.hidden_size,
        size_bytes=checkpoint.size_bytes,
        itemsize=checkpoint.dtype.itemsize,
    )
