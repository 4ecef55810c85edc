"""Open a checkpoint: its configuration and where its tensors are. No weight is read here."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.checks import (
    check_counts,
    check_directory,
    check_fetches_nothing,
    check_fields,
    check_layers_stand_alone,
    check_not_quantised,
    check_tensors,
    find_head,
)
from layer_surgery.checkpoint.conversion import as_in_model, with_conv1d_transposed
from layer_surgery.checkpoint.embedder import MODULES_FILE, AskedHead, read_embedder
from layer_surgery.checkpoint.heads import (
    CAUSAL_LM,
    EMBEDDING,
    Head,
    base_class_of,
    head_of_model,
)
from layer_surgery.checkpoint.hub import local_directory
from layer_surgery.checkpoint.modeling_layer_surgery import (
    HEADLESS,
    MODEL_TYPE,
    MODELS,
    LayerSurgeryConfig,
    base_fields,
    head_of,
    model_class_for,
)
from layer_surgery.checkpoint.tensors import SafetensorsSource, StateDictSource, checkpoint_files
from layer_surgery.disk.reading import read_json, why
from layer_surgery.errors import CheckpointError


def open_checkpoint(
    model: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: str = "auto",
    pooling: str | None = None,
) -> Checkpoint:
    """Open a local directory, a hub name, or a model that is already in memory.

    Headers and shapes are checked against the architecture before anything else happens.
    `head` is `embedding` for a transformer that is an embedding model with this `pooling`, where no directory of
    sentence-transformers says so itself.
    Raises `CheckpointError` for everything that makes the checkpoint unusable.
    """
    if isinstance(model, PreTrainedModel):
        checkpoint = _from_memory(model, AskedHead(head == EMBEDDING.kind, pooling))
    else:
        if not isinstance(model, str | Path):
            raise CheckpointError(
                f"MODEL is a {type(model).__name__}; allowed: a directory, a hub name or a PreTrainedModel."
            )
        directory = local_directory(str(model), revision)
        checkpoint = _from_directory(
            str(model), directory, trust_remote_code, AskedHead(head == EMBEDDING.kind, pooling)
        )
    _settle(checkpoint)
    return checkpoint


def _from_directory(name: str, root: Path, trust_remote_code: bool, asked: AskedHead) -> Checkpoint:
    embedder, directory = None, root
    if (root / MODULES_FILE).is_file():
        embedder, directory = read_embedder(root)
        if asked.pooling is not None:
            raise CheckpointError(
                f"{root} says itself how it pools ({', '.join(embedder.pooling)}); leave out --pooling {asked.pooling}."
            )
    check_directory(directory)
    fields, model_type = _read_fields(directory, trust_remote_code)
    files = checkpoint_files(directory)
    source = SafetensorsSource(files)
    check_counts(fields, source.specs, directory / "config.json")
    low_rank: dict[str, int] = {}
    narrowed: dict[str, tuple[int, int]] = {}
    model_class: type[PreTrainedModel] | None = None
    if model_type == MODEL_TYPE:
        config, model_class = _low_rank_config(fields, directory, embedding=embedder is not None or asked.embedding)
        low_rank, narrowed, fields = config.low_rank, config.narrowed, _base_fields(config, fields)
        check_not_quantised(fields, directory)  # by what is nested, too
    else:
        config = _stock_config(directory, trust_remote_code)
    if embedder is None:
        embedder = asked.embedder(config, str(directory))
    head = find_head(config, fields, str(directory), embedding=embedder is not None)
    if head is EMBEDDING:
        # Stored with another head, perhaps, which transformers' model without one passes over.
        fields = fields | {"architectures": [head.stock_classes[base_class_of(config)].__name__]}
    check_layers_stand_alone(config, str(directory))
    return Checkpoint(
        name=name,
        config=config,
        config_fields=fields,
        low_rank=low_rank,
        narrowed=narrowed,
        source=source,
        head=head,
        directory=directory,
        files=tuple(files),
        trust_remote_code=trust_remote_code,
        model_class=model_class,
        embedder=embedder,
    )


def _read_fields(directory: Path, trust_remote_code: bool) -> tuple[dict[str, Any], str]:
    """Return the fields of `config.json`, checked before anything is made of them, and the type of the model."""
    config_file = directory / "config.json"
    try:
        # transformers writes infinities as objects, which only its own reader turns back.
        fields = PreTrainedConfig._decode_special_floats(read_json(config_file))
        model_type = fields["model_type"]
    except OSError as error:
        raise CheckpointError(f"{config_file} cannot be read ({why(error)}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config_file} is damaged or has no model_type ({error}).") from error
    check_fields(fields, config_file)
    if not trust_remote_code:
        check_fetches_nothing(fields, config_file)
    check_not_quantised(fields, directory)
    return fields, model_type


def _low_rank_config(fields: dict[str, Any], directory: Path, *, embedding: bool) -> tuple[Any, type[PreTrainedModel]]:
    """Return the configuration of a checkpoint with low-rank or narrowed layers, and the class of its model."""
    try:
        config = LayerSurgeryConfig.from_dict(fields)
    except Exception as error:  # transformers raises many types here, each about this one file
        reason = " ".join(str(error).split())[:300]
        file = directory / "config.json"
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {reason}).") from error
    head = head_of(config.architectures)
    if embedding and head != HEADLESS:
        raise CheckpointError(
            f"{directory} has low-rank or narrowed layers and the head of a {head}; make an embedding model of the "
            "original, and compress that."
        )
    return config, model_class_for(type(config), HEADLESS if embedding else head)


def _base_fields(config: Any, nested: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.json` of the stock architecture would hold, from the nested form of a low-rank checkpoint."""
    stock_class = MODELS[head_of(config.architectures)][1][config.base_class]
    fields = {**base_fields(nested), "model_type": nested["base_model_type"]}
    return fields | {"architectures": [stock_class.__name__]}


def _stock_config(directory: Path, trust_remote_code: bool) -> Any:
    try:
        # False, not None: transformers would otherwise ask on the terminal.
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here, each about this one file
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not trust_remote_code:
            raise CheckpointError(
                f"{directory} needs Python code that comes with it; read that code, and if you trust it pass "
                "--trust-remote-code (trust_remote_code=True)."
            ) from error
        if "does not recognize this architecture" in reason:
            raise CheckpointError(
                f"{directory} has a model_type in its config.json that transformers {transformers.__version__} does "
                f"not know ({reason[reason.find('model type') :].split(' but ')[0]}); correct it, or install a version "
                "of transformers that knows it."
            ) from error
        raise CheckpointError(f"transformers cannot read {directory / 'config.json'}: {reason[:300]}") from error


def _from_memory(model: PreTrainedModel, asked: AskedHead) -> Checkpoint:
    embedder = asked.embedder(model.config, f"the {type(model).__name__}")
    if embedder is not None:
        if type(model.base_model) is not type(model):
            raise CheckpointError(
                f"the {type(model).__name__} has a head, which an embedding model has not; pass its body "
                "(model.base_model)."
            )
        head: Head | None = EMBEDDING
    else:
        head = head_of_model(model)
    if head is None:
        raise CheckpointError(
            f"a {type(model).__name__} is not a causal language model and has no other head that there is a loss for; "
            "load it with AutoModelForCausalLM, or with AutoModelForMaskedLM, ...ForSequenceClassification or "
            '...ForTokenClassification; or pass head="embedding" and pooling= for an embedding model.'
        )
    fields = model.config.to_dict()
    low_rank = dict(getattr(model.config, "low_rank", {}) or {})
    narrowed = dict(getattr(model.config, "narrowed", {}) or {})
    if low_rank or narrowed:
        fields = _base_fields(model.config, fields)
    # As save_pretrained does: a model made from its configuration has neither there.
    fields["architectures"] = fields.get("architectures") or [type(model).__name__]
    if head is not CAUSAL_LM:  # another one than that of the checkpoint it was loaded from, perhaps
        fields["architectures"] = [head.stock_classes[base_class_of(model.config)].__name__]
    find_head(model.config, fields, f"the {type(model).__name__}", embedding=head is EMBEDDING)
    check_layers_stand_alone(model.config, f"the {type(model).__name__}")
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    tensors = model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError("the model has tensors on the meta device (offloaded?); load it into memory first.")
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    return Checkpoint(
        name=type(model).__name__,
        config=model.config,
        config_fields=fields,
        low_rank=low_rank,
        narrowed=narrowed,
        head=head,
        source=StateDictSource({name: tensor for name, tensor in tensors.items() if name not in tied}),
        model_class=type(model),
        buffers=dict(model.named_non_persistent_buffers()),
        generation_config=getattr(model, "generation_config", None),
        embedder=embedder,
    )


def _settle(checkpoint: Checkpoint) -> None:
    """Put the stored tensors into the form that the model has, and compare them with what it calls for."""
    where = str(checkpoint.directory or checkpoint.name)
    try:
        skeleton = checkpoint.skeleton
    except Exception as error:  # an architecture raises what it likes about sizes that do not go together
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the model that the configuration of {checkpoint.name} describes cannot be built "
            f"({type(error).__name__}: {reason})."
        ) from error
    _ = checkpoint.architecture
    without_place: list[str] = []
    if checkpoint.directory is None:
        checkpoint.source = with_conv1d_transposed(checkpoint.source, skeleton)
    else:
        checkpoint.source, without_place = as_in_model(checkpoint.source, skeleton)
    checkpoint.left_out = check_tensors(
        skeleton,
        checkpoint.source.specs,
        without_place,
        where=where,
        layer_count=checkpoint.layer_count,
        encoder=checkpoint.encoder,
        headless=checkpoint.head is EMBEDDING,
    )
