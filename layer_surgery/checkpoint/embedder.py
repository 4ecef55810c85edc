"""Embedding models as directories of sentence-transformers: `modules.json` and the folders that it names.

Read and written here without that package, and without running any code that comes with a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from layer_surgery.checkpoint.sentence_modules import (
    KNOWN,
    MODULE_PREFIX,
    POOLING_MODES,
    SentenceModules,
    StoredModule,
    build,
    pooling_modes,
)
from layer_surgery.disk.reading import read_json, why
from layer_surgery.errors import CheckpointError, nearest_name

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
#: What versions before 2.3 called the latter.
_OLD_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json" for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PACKAGE = "sentence_transformers."
#: What the classes of all versions are found by.
_MODELS = "sentence_transformers.models."
_WEIGHTS_FILE = "model.safetensors"
#: What the transformer's file may say; everything else about it would change what is computed.
_TRANSFORMER_FIELDS = {
    "max_seq_length": None,
    "do_lower_case": None,
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (None, True, False),  # the same numbers, with or without padding
}


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """What makes a transformer an embedding model, as it is stored."""

    where: str  #: The model's directory, for messages.
    root: Path | None = None  #: That directory, of which the transformer's may be a folder.
    transformer_type: str  #: Full name of the transformer's class in sentence-transformers.
    stored: tuple[StoredModule, ...]  #: Behind the transformer.
    settings: Mapping[str, Any] = field(default_factory=dict)  #: Prompts and the like.
    transformer: Mapping[str, Any] = field(default_factory=dict)  #: How texts reach the transformer.

    def modules(self) -> SentenceModules:
        """Return the modules behind the transformer, in the dtypes in which they are stored."""
        return build(self.stored, self.where)

    @property
    def pooling(self) -> tuple[str, ...]:
        """The ways of pooling."""
        return pooling_modes(self.stored[0].config, self.where)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors behind the transformer, by folder and name."""
        return {f"{each.path}/{name}": tensor for each in self.stored for name, tensor in each.tensors.items()}

    @property
    def longest(self) -> int | None:
        """Tokens behind which sentence-transformers cuts texts off; None where that is the model's own limit."""
        return self.transformer.get("max_seq_length")

    @property
    def prompt(self) -> str:
        """What stands before every text unless a user of the model asks for another prompt."""
        prompts, name = self.settings.get("prompts") or {}, self.settings.get("default_prompt_name")
        return str(prompts.get(name) or "") if name is not None else ""

    def prompt_for(self, *names: str) -> str:
        """Return what stands before a text of a kind, by the first of some names that the model has a prompt for."""
        prompts = self.settings.get("prompts") or {}
        return next((str(prompts[name]) for name in names if prompts.get(name)), self.prompt)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors behind the transformer that can be trained, by the names that they have in `modules()`."""
        names = dict(self.modules().named_parameters())
        return {name: tensor for name, (_, _, tensor) in self._named().items() if name in names}

    def with_weights(self, weights: Mapping[str, Tensor]) -> Embedder:
        """Return it with other values for some of `weights`, stored in the dtypes of the old ones."""
        stored = list(self.stored)
        for name, tensor in weights.items():
            number, local, old = self._named()[name]
            changed = {**stored[number].tensors, local: tensor.detach().to("cpu", old.dtype).contiguous()}
            stored[number] = replace(stored[number], tensors=changed)
        return replace(self, stored=tuple(stored))

    def _named(self) -> dict[str, tuple[int, str, Tensor]]:
        """Return, by the name in `modules()`, the module that has a tensor, its name there, and the tensor."""
        return {
            f"{MODULE_PREFIX}{number - 1}.{local}": (number, local, tensor)
            for number, each in enumerate(self.stored)
            for local, tensor in each.tensors.items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what is computed, as JSON has it; tensors by their hash."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name.rpartition('/')[2]} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(safetensors.torch.save({"": tensor.contiguous()}))
        modules = [[each.kind, dict(each.config)] for each in self.stored]
        return {"modules": modules, "transformer": dict(self.transformer), "tensors": digest.hexdigest()}

    def prepared(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Have a tokenizer write in lower case first, where the model says so and the tokenizer does not."""
        from tokenizers.normalizers import Lowercase, Sequence

        if not self.transformer.get("do_lower_case"):
            return tokenizer
        backend = tokenizer.backend_tokenizer
        backend.normalizer = Sequence([Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])])
        return tokenizer

    def dimensions(self, hidden_size: int) -> int:
        """Return the numbers in a vector, of a transformer of this width."""
        dense = [each.config["out_features"] for each in self.stored if each.kind == "Dense"]
        return int(dense[-1]) if dense else hidden_size * len(self.pooling)

    def mapped(self, weight: Tensor, bias: Tensor) -> Embedder:
        """Return it with an affine map of its vectors at length 1: a weight [out, in] and a bias [out].

        They are made that long before the map, and behind it again where they were so without it.
        """
        config = {
            "in_features": int(weight.shape[1]),
            "out_features": int(weight.shape[0]),
            "bias": True,
            # Said, for without it the activation is taken for tanh.
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        tensors = {"linear.weight": weight, "linear.bias": bias}
        normalize = StoredModule(type=f"{_MODELS}Normalize", path="", config={})
        dense = StoredModule(type=f"{_MODELS}Dense", path="", config=config, tensors=tensors)
        end = len(self.stored)
        while end > 1 and self.stored[end - 1].kind in ("Normalize", "Dropout"):
            end -= 1
        # Folders have the number of their module in their names.
        together = [*self.stored[:end], normalize, dense, *self.stored[end:]]
        return replace(
            self, stored=tuple(replace(each, path=f"{k}_{each.kind}") for k, each in enumerate(together, start=1))
        )

    def save(self, directory: Path) -> None:
        """Write the files beside the transformer's, which are in `directory` itself."""
        listed = [{"idx": 0, "name": "0", "path": "", "type": self.transformer_type}]
        for number, each in enumerate(self.stored, start=1):
            listed.append({"idx": number, "name": str(number), "path": each.path, "type": each.type})
            (directory / each.path).mkdir(parents=True)
            _write(directory / each.path / "config.json", dict(each.config))
            if each.tensors:
                tensors = {name: tensor.contiguous() for name, tensor in each.tensors.items()}
                safetensors.torch.save_file(tensors, directory / each.path / _WEIGHTS_FILE, {"format": "pt"})
        _write(directory / MODULES_FILE, listed)
        _write(directory / TRANSFORMER_FILE, dict(self.transformer))
        if self.settings:
            _write(directory / SETTINGS_FILE, dict(self.settings))


@dataclass(frozen=True)
class AskedHead:
    """What a user says of the head."""

    embedding: bool
    pooling: str | None

    def embedder(self, config: PreTrainedConfig, where: str) -> Embedder | None:
        """Return what is behind a transformer of which no file says it."""
        if self.embedding:
            pooling, hidden_size = _checked_pooling(self.pooling, where), getattr(config, "hidden_size", None)
            if not isinstance(hidden_size, int):
                raise CheckpointError(f"{where} has no hidden_size of its own, so it cannot be an embedding model.")
            return _new_embedder(pooling, hidden_size, where)
        if self.pooling is not None:
            raise CheckpointError(
                f"--pooling {self.pooling} is for embedding models, and {where} is not said to be one; add --head "
                "embedding, or leave it out."
            )
        return None


def _new_embedder(pooling: str, hidden_size: int, where: str) -> Embedder:
    """Return what makes an embedding model of a plain transformer: pooling, and vectors of length 1."""
    config = {"word_embedding_dimension": hidden_size, "include_prompt": True} | {
        f"pooling_mode_{name}": pooling == mode
        for name, mode in (
            ("cls_token", "cls"),
            ("max_tokens", "max"),
            ("mean_tokens", "mean"),
            ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
            ("weightedmean_tokens", "weightedmean"),
            ("lasttoken", "lasttoken"),
        )
    }
    stored = (
        StoredModule(type=f"{_MODELS}Pooling", path="1_Pooling", config=config),
        StoredModule(type=f"{_MODELS}Normalize", path="2_Normalize", config={}),
    )
    return Embedder(where=where, transformer_type=f"{_MODELS}Transformer", stored=stored)


def _checked_pooling(pooling: str | None, where: str) -> str:
    """Return the way of pooling that a user names for a plain transformer. Raises `CheckpointError` without one."""
    if pooling in POOLING_MODES:
        return str(pooling)
    found = "no --pooling is given" if pooling is None else f"--pooling is '{pooling}'"
    raise CheckpointError(
        f"{where} has no {MODULES_FILE} that says how the states of its tokens become one vector, and {found}; "
        f"allowed: --pooling {', '.join(POOLING_MODES)}."
        f"{nearest_name(pooling, POOLING_MODES) if pooling else ''}"
    )


def read_embedder(root: Path) -> tuple[Embedder, Path]:
    """Read a directory of sentence-transformers; return what is behind the transformer, and the transformer's folder.

    Raises `CheckpointError` for what is damaged, for modules that are not known, by name, and for settings of the
    transformer that would change what it computes.
    """
    first, *others = _listed(root)
    _check_known(root, first, ("Transformer",), "the first module")
    for each in others:
        _check_known(root, each, KNOWN, "a module")
    folder = root / first["path"]
    stored = tuple(_stored(root, each) for each in others)
    settings = _json(root / SETTINGS_FILE) if (root / SETTINGS_FILE).is_file() else {}
    if not isinstance(settings, dict) or not isinstance(settings.get("prompts") or {}, dict):
        raise CheckpointError(f"{root / SETTINGS_FILE} is damaged: it must be an object, and its prompts too.")
    embedder = Embedder(
        where=str(root),
        root=root,
        transformer_type=first["type"],
        stored=stored,
        settings=settings,
        transformer=_transformer_settings(folder),
    )
    embedder.modules()  # raises for what does not fit
    return embedder, folder


def module_folders(root: Path) -> list[str]:
    """Return the folders of modules that `modules.json` names. Raises `CheckpointError` if it is damaged."""
    return [entry["path"] for entry in _listed(root) if entry["path"] not in ("", ".")]


def _listed(root: Path) -> list[dict[str, str]]:
    listed = _json(root / MODULES_FILE)
    if not (isinstance(listed, list) and listed and all(_is_entry(each) for each in listed)):
        raise CheckpointError(f"{root / MODULES_FILE} is damaged: it must be a list of modules with type and path.")
    return listed


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
        return False
    path = PurePosixPath(entry["path"])
    return not path.is_absolute() and ".." not in path.parts


def _check_known(root: Path, entry: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    kind, name = entry["type"], entry["type"].rpartition(".")[2]
    if not kind.startswith(_PACKAGE) or name not in known:
        raise CheckpointError(
            f"{root / MODULES_FILE} has '{kind}' as {what} ('{entry['path']}'), which is not known, so what the model "
            f"computes would not be; allowed: {', '.join(known)} of sentence-transformers."
        )


def _stored(root: Path, entry: Mapping[str, Any]) -> StoredModule:
    folder = root / entry["path"]
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is damaged: it must be an object.")
    tensors: dict[str, Tensor] = {}
    if (folder / _WEIGHTS_FILE).is_file():
        try:
            tensors = safetensors.torch.load_file(folder / _WEIGHTS_FILE)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{folder / _WEIGHTS_FILE} is damaged ({error}); download it again.") from error
    elif (folder / "pytorch_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has its weights in pytorch_model.bin only, which may run code when it is read; save the model "
            "again with SentenceTransformer(...).save_pretrained(...), which writes safetensors."
        )
    return StoredModule(type=entry["type"], path=entry["path"], config=config, tensors=tensors)


def _transformer_settings(folder: Path) -> dict[str, Any]:
    file = next(
        (folder / name for name in (TRANSFORMER_FILE, *_OLD_TRANSFORMER_FILES) if (folder / name).is_file()), None
    )
    settings = {} if file is None else _json(file)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is damaged: it must be an object.")
    for name, value in settings.items():
        allowed = _TRANSFORMER_FIELDS.get(name, ())
        if allowed is not None and value is not None and value not in allowed:
            raise CheckpointError(
                f"{file} has {name}: {value!r}, which would change what the transformer computes and is not supported; "
                "allowed are texts to the last hidden states of their tokens."
            )
    longest = settings.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise CheckpointError(f"{file} has max_seq_length: {longest!r}; it must be a whole number, 1 or more.")
    return settings


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({why(error)}).") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}).") from error


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
