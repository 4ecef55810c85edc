"""The contract of embedding models: a tiny random one of each kind goes through the tool and back."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from surgery_helpers import saved_result, tiny_bench
from tiny_embedders import dense, saved_embedder, text_tokens, write_json
from tiny_encoders import encoder_tokenizer, tiny_encoder
from tiny_families import ENCODERS
from tiny_models import (
    full_ranks,
    largest_difference,
    make_test_plan,
    padded_on_the_right,
    settings,
    streamed,
    walked_gradients,
    without_layers,
)
from torch import Tensor, nn

import layer_surgery
from layer_surgery.calibration.units import mlp_channels
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.walk.embedding import curvature_probes, probe_generator
from layer_surgery.walk.self_check import check_walk
from layer_surgery.walk.walk import Walk

FLOAT64 = torch.float64
#: (architecture, pooling, modules behind it): every way of pooling, and every module.
CASES: list[tuple[str, Any, tuple[dict[str, Any], ...]]] = [
    ("bert", "mean", (dense(32, 24, activation="activation.Tanh"), {"kind": "Normalize"})),
    ("mpnet", "mean_sqrt_len_tokens", ({"kind": "Normalize"},)),
    ("roberta", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}, ({"kind": "Dropout"},)),
    ("distilbert", ["cls", "max"], (dense(64, 32), dense(32, 16, activation="activation.GELU", seed=4))),
    ("modernbert", "mean", ({"kind": "Normalize"},)),
    ("qwen3", "lasttoken", ({"kind": "Normalize"},)),
    ("mistral", "weightedmean", ({"kind": "Normalize"},)),
    ("llama", {"embedding_dimension": 32, "pooling_mode": ["mean"]}, ()),
]


@dataclass
class Case:
    """A tiny random embedding model, float64, and what it is without the tool."""

    model_type: str
    path: Path
    modes: Any
    others: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        self.tokens = text_tokens(open_checkpoint(self.path).objective)
        #: ModernBERT's first layer has no norm before its attention, so no other can take its place.
        self.removed = [1, 3] if self.model_type == "modernbert" else [0, 3]

    @property
    def body(self) -> transformers.PreTrainedModel:
        return transformers.AutoModel.from_pretrained(self.path, dtype="auto").eval()

    def embed(self, body: Any, tokens: PackedTokens | None = None) -> Tensor:
        """Return what a transformer and the modules give, written once more and text by text, without padding."""
        found, tokens = [], tokens or self.tokens
        for row, count in enumerate(tokens.valid.sum(dim=1).tolist()):
            ids = tokens.token_ids[row : row + 1, :count]
            # Encoders keep no cache, and a decoder that is cut by hand has none that fits.
            options = {} if self.model_type in ENCODERS else {"use_cache": False}
            states = body(input_ids=ids, attention_mask=torch.ones_like(ids), **options).last_hidden_state[0]
            vector = torch.cat([_POOLED[mode](states) for mode in self._modes()])
            for other in self.others:
                vector = _after(other, vector)
            found.append(vector)
        return torch.stack(found)

    def _modes(self) -> list[str]:
        if isinstance(self.modes, dict):
            return ["cls"] if "pooling_mode_cls_token" in self.modes else self.modes["pooling_mode"]
        return [self.modes] if isinstance(self.modes, str) else self.modes


def _weighted(states: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(states) + 1, dtype=states.dtype)
    return (weights[:, None] * states).sum(dim=0) / weights.sum()


_POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.amax(dim=0),
    "mean": lambda states: states.mean(dim=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(dim=0) / len(states) ** 0.5,
    "weightedmean": _weighted,
}


def _after(module: dict[str, Any], vector: Tensor) -> Tensor:
    if module["kind"] == "Dense":
        weights = {name: tensor.double() for name, tensor in module["tensors"].items()}
        mapped = weights["linear.weight"] @ vector + weights["linear.bias"]
        return getattr(nn, module["config"]["activation_function"].rpartition(".")[2])()(mapped)
    return vector / vector.norm() if module["kind"] == "Normalize" else vector


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, modes, others = request.param
    pooling = {"embedding_dimension": 32, "pooling_mode": modes} if isinstance(modes, list) else modes
    path = tmp_path_factory.mktemp(model_type) / "model"
    saved_embedder(path, model_type, pooling=pooling, others=others, dtype=FLOAT64)
    return Case(model_type, path, modes, others)


def vectors_of(path: Any, tokens: PackedTokens, scratch: Path) -> Tensor:
    return text_vectors(streamed(path), tokens, settings(scratch, batch_size=3))


def save_operated(plan: SurgeryPlan, case: Case, output: Path) -> Path:
    return saved_result(plan, open_checkpoint(case.path), output, tokens=case.tokens, dtype=FLOAT64, ranks_fixed=True)


def test_the_walk_gives_the_embeddings_of_the_model_and_its_modules(case: Case, tmp_path: Path) -> None:
    model = streamed(case.path, resident_bytes=0)
    check_walk(model)
    assert model.checkpoint.head.kind == "embedding" and model.checkpoint.objective.problem == "embedding"
    found = vectors_of(case.path, case.tokens, tmp_path)
    with torch.no_grad():
        assert largest_difference(found, case.embed(case.body)) < 1e-9
    padded = vectors_of(case.path, padded_on_the_right(case.tokens, 5), tmp_path)
    assert largest_difference(found, padded) < (1e-6 if case.model_type == "modernbert" else 1e-9)


def test_the_gradients_are_those_of_the_probes(case: Case, tmp_path: Path) -> None:
    model, body = streamed(case.path), case.body
    vectors = vectors_of(case.path, case.tokens, tmp_path)
    with Walk(model, replace(case.tokens, labels=vectors), settings(tmp_path)) as walk:
        gradients = walked_gradients(walk)
        last = walk.boundary(model.layer_count)
        assert float(walk.losses(last).sums.sum()) < 1e-18, "the original is its own teacher"
    probes = curvature_probes(vectors, probe_generator(case.tokens.sha256))
    parameters = {name: p for name, p in body.named_parameters() if name in gradients}
    assert len(parameters) == len(gradients) >= 5 * 5
    own = torch.autograd.grad((case.embed(body) * probes).sum(), list(parameters.values()), allow_unused=True)
    largest = max(float(g.abs().max()) for g in own if g is not None)
    for name, gradient in zip(parameters, own, strict=True):
        expected = torch.zeros_like(parameters[name]) if gradient is None else gradient
        assert float((gradients[name] - expected).abs().max()) < 1e-7 * largest, name


def test_a_model_without_two_layers_is_plain_and_is_the_original_without_them(case: Case, tmp_path: Path) -> None:
    plan = make_test_plan(5, removed=case.removed, method="remove")
    output = save_operated(plan, case, tmp_path / "output")
    assert not (output / "modeling_layer_surgery.py").exists()
    body, info = transformers.AutoModel.from_pretrained(output, dtype="auto", output_loading_info=True)
    missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}  # which the original has not
    assert not missing and not info["unexpected_keys"] and type(body) is type(case.body)
    with torch.no_grad():
        expected = case.embed(without_layers(case.body, case.removed))
        assert largest_difference(vectors_of(output, case.tokens, tmp_path), expected) < 1e-9
        assert largest_difference(case.embed(body.eval()), expected) < 1e-9
        assert largest_difference(case.embed(case.body), expected) > 1e-3, "the removed layers did nothing"
    saved, base = open_checkpoint(output), open_checkpoint(case.path)
    assert saved.embedder is not None and base.embedder is not None
    assert saved.embedder.identity == base.embedder.identity


def test_low_rank_and_narrower_layers_survive_saving_and_loading(case: Case, tmp_path: Path) -> None:
    base = open_checkpoint(case.path)
    units = mlp_channels(base.layers[4], base.architecture)
    assert units is not None and units.count == 40
    plan = make_test_plan(5, removed=[1], low_rank={2: dict.fromkeys(full_ranks(base, 2), 3)}, method="mix")
    layers = [*plan.layers[:4], LayerPlan(index=4, action="reduce", channels=12)]
    output = save_operated(replace(plan, layers=layers), case, tmp_path / "output")
    found = vectors_of(output, case.tokens, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(output, dtype="auto", trust_remote_code=True).eval()
    assert type(loaded).__name__ == "LayerSurgeryModel"
    with torch.no_grad():
        assert largest_difference(case.embed(loaded), found) < 1e-9
        assert largest_difference(case.embed(layer_surgery.load(output).eval()), found) < 1e-9
        assert largest_difference(case.embed(case.body), found) > 1e-3
    check_walk(streamed(output))
    # Multiplied out and filled up with zeros, it is a plain directory of sentence-transformers that computes the same.
    dense = tmp_path / "dense"
    layer_surgery.export_dense(output, dense)
    assert largest_difference(vectors_of(dense, case.tokens, tmp_path), found) < 1e-9
    if hasattr(loaded, "pooler"):
        loaded.pooler = None  # transformers has made one, which the original has not
    loaded.save_pretrained(tmp_path / "again")
    for name in ("modules.json", "sentence_bert_config.json", *(f.name for f in output.iterdir() if f.is_dir())):
        copying = shutil.copytree if (output / name).is_dir() else shutil.copyfile
        copying(output / name, tmp_path / "again" / name)
    assert open_checkpoint(tmp_path / "again").sha256() == open_checkpoint(output).sha256()


# What else a directory may be


def test_the_transformer_may_be_in_a_folder_and_prompts_come_along(tmp_path: Path) -> None:
    told = {
        "prompts": {"query": "the fox: ", "document": ""},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    }
    path = saved_embedder(tmp_path / "model", folder="0_Transformer", settings=told)
    (path / "LICENSE").write_text("free")
    base = open_checkpoint(path)
    tokens = text_tokens(base.objective)
    tokenizer = encoder_tokenizer()
    assert tokenizer.decode(tokens.token_ids[1, : int(tokens.valid[1].sum())]).endswith("the fox: dog<eos>")
    plan = make_test_plan(5, removed=[2], method="remove")
    output = saved_result(plan, base, tmp_path / "output", tokens=tokens, dtype=torch.float32)
    listed = json.loads((output / "modules.json").read_text())
    assert [module["path"] for module in listed] == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((output / "config_sentence_transformers.json").read_text()) == told
    assert json.loads((output / "sentence_bert_config.json").read_text())["max_seq_length"] == 60
    assert (output / "tokenizer.json").is_file() and (output / "LICENSE").read_text() == "free"


@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_a_plain_transformer_becomes_an_embedding_model(model_type: str, tmp_path: Path) -> None:
    """Also from the weights of a model with another head, whose names have a prefix and which is left out."""
    problem = "masked_token" if model_type == "bert" else "next_token"
    made = tiny_encoder(model_type, problem, vocab_size=320)
    made.save_pretrained(tmp_path / "whole")
    made.base_model.save_pretrained(tmp_path / "body")
    whole, body, memory = (
        open_checkpoint(each, head="embedding", pooling="mean")
        for each in (tmp_path / "whole", tmp_path / "body", made.base_model)
    )
    tokens = text_tokens(whole.objective)
    found = [vectors_of_checkpoint(each, tokens, tmp_path) for each in (whole, body, memory)]
    assert largest_difference(found[0], found[1]) == largest_difference(found[0], found[2]) == 0
    assert torch.allclose(found[0].norm(dim=1), torch.ones(len(found[0]), dtype=FLOAT64))
    left_out = {name.partition(".")[0] for name in whole.left_out}
    assert left_out <= {"cls", "lm_head"} and not body.left_out
    assert whole.sha256() == body.sha256()
    other = open_checkpoint(tmp_path / "body", head="embedding", pooling="max")
    assert other.sha256() != body.sha256()


def vectors_of_checkpoint(checkpoint: Any, tokens: PackedTokens, scratch: Path) -> Tensor:
    from layer_surgery.walk.streamed import StreamedModel

    model = StreamedModel(checkpoint, device=torch.device("cpu"), dtype=FLOAT64)
    return text_vectors(model, tokens, settings(scratch))


def test_a_pooler_stays_where_there_is_one(tmp_path: Path) -> None:
    path = saved_embedder(tmp_path / "model")
    pretrained = transformers.BertModel.from_pretrained(path)  # makes a pooler
    pretrained.save_pretrained(path)
    base = open_checkpoint(path)
    tokens = text_tokens(base.objective)
    plan = make_test_plan(5, removed=[2], method="remove")
    output = saved_result(plan, base, tmp_path / "output", tokens=tokens, dtype=torch.float32)
    _, info = transformers.AutoModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_texts_that_do_not_fit_are_cut_into_pieces_and_nothing_is_lost(tmp_path: Path) -> None:
    told = {"prompts": {"q": "fox "}, "default_prompt_name": "q"}
    objective = open_checkpoint(saved_embedder(tmp_path / "model", settings=told)).objective
    long = " ".join(f"one two {number}" for number in range(30))
    tokens = text_tokens(objective, ["short", f"a paragraph\n\n{long}"], sequence_length=20)
    tokenizer = encoder_tokenizer()
    rows = [tokenizer.decode(row[valid]) for row, valid in zip(tokens.token_ids, tokens.valid, strict=True)]
    assert all(row.startswith("<bos>fox") and row.endswith("<eos>") for row in rows)
    assert rows[:2] == ["<bos>fox short<eos>", "<bos>fox a paragraph<eos>"]
    rest = "".join(row.removeprefix("<bos>fox").removesuffix("<eos>") for row in rows[2:])
    assert rest.strip() == long and len(rows) > 4


# What is refused


def _edited(path: Path, name: str, change: Callable[[Any], Any]) -> Path:
    data = json.loads((path / name).read_text())
    write_json(path / name, change(copy.deepcopy(data)))
    return path


REFUSED: list[tuple[str, str, Callable[[Any], Any], str]] = [
    (
        "remote code",
        "modules.json",
        lambda m: [m[0] | {"type": "custom_st.Transformer"}, *m[1:]],
        r"'custom_st.Transformer'",
    ),
    (
        "unknown module",
        "modules.json",
        lambda m: [*m, {"idx": 3, "name": "3", "path": "3_CNN", "type": "sentence_transformers.models.CNN"}],
        r"'sentence_transformers.models.CNN' as a module \('3_CNN'\), which is not known.*Pooling, Dense",
    ),
    ("outside", "modules.json", lambda m: [m[0], m[1] | {"path": "../other"}], "is damaged"),
    (
        "no pooling",
        "modules.json",
        lambda m: [m[0], m[2]],
        "has Normalize behind its transformer; allowed: Pooling first",
    ),
    ("no list", "modules.json", lambda m: {}, "must be a list of modules"),
    ("pooling", "1_Pooling/config.json", lambda c: c | {"pooling_mode": "median"}, "'median'; allowed: cls, max, mean"),
    (
        "task",
        "sentence_bert_config.json",
        lambda c: c | {"transformer_task": "fill-mask"},
        "transformer_task: 'fill-mask'",
    ),
    ("option", "sentence_bert_config.json", lambda c: c | {"query_expansion": {"length": 3}}, "query_expansion"),
    ("length", "sentence_bert_config.json", lambda c: c | {"max_seq_length": "long"}, "max_seq_length: 'long'"),
    ("prompts", "config_sentence_transformers.json", lambda c: {"prompts": ["a"]}, "config_sentence_transformers.json"),
    ("size", "2_Dense/config.json", lambda c: c | {"out_features": 12}, r"calls for .*\[12, 32\]"),
    (
        "activation",
        "2_Dense/config.json",
        lambda c: c | {"activation_function": "os.system"},
        "the activation os.system; allowed are these of torch.nn",
    ),
    ("tokens", "2_Dense/config.json", lambda c: c | {"module_input_name": "token_embeddings"}, "one vector a text"),
]


@pytest.mark.parametrize(
    ("name", "file", "change", "message"), REFUSED, ids=[each[0].replace(" ", "-") for each in REFUSED]
)
def test_what_is_not_known_is_refused_by_name(
    name: str, file: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    others = (dense(32, 16),) if file.startswith("2_Dense") else ({"kind": "Normalize"},)
    path = _edited(saved_embedder(tmp_path / "model", layers=1, others=others), file, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    path = saved_embedder(tmp_path / "model", layers=1, others=(dense(32, 16),))
    (path / "2_Dense" / "model.safetensors").rename(path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin only, which may run code"):
        open_checkpoint(path)


def test_heads_and_poolings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = saved_embedder(tmp_path / "model", layers=1)
    with pytest.raises(CheckpointError, match=r"says itself how it pools \(mean\); leave out --pooling cls"):
        open_checkpoint(path, pooling="cls")
    (path / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"no --pooling is given; allowed: --pooling cls, max"):
        open_checkpoint(path, head="embedding")
    with pytest.raises(CheckpointError, match=r"add --head embedding"):
        open_checkpoint(path, pooling="mean")
    with pytest.raises(CheckpointError, match=r"or others with --head embedding and --pooling"):
        open_checkpoint(path)
    classifier = tiny_encoder("bert", "single_label", layers=1)
    with pytest.raises(CheckpointError, match=r"has a head, which an embedding model has not"):
        open_checkpoint(classifier, head="embedding", pooling="mean")


def test_a_bench_teaches_texts_by_the_original(tmp_path: Path) -> None:
    """Each text's label is what the original gives for it, so nothing but texts is needed."""
    base = open_checkpoint(saved_embedder(tmp_path / "model", dtype=FLOAT64))
    tokens = text_tokens(base.objective)
    with tiny_bench(base, tmp_path / "scratch", tokens=tokens) as bench:
        labels = bench.walk.tokens.labels
        assert labels is not None
        assert largest_difference(labels, vectors_of(tmp_path / "model", tokens, tmp_path)) < 1e-12
