"""A checkpoint with low-rank layers: stock transformers load it without this package, or refuse it; never wrongly."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    WITHOUT_LAYER_SURGERY,
    edit_json,
    edit_tensors,
    listing,
    logits,
    model_with_vocabulary,
    run_stock_script,
    saved_model,
    text_file,
)
from tiny_models import decoder_layers, full_ranks, make_test_plan, packed_tokens, settings, streamed, walked_logits
from torch import nn
from transformers.pytorch_utils import Conv1D

import layer_surgery
from layer_surgery.checkpoint.modeling_layer_surgery import LowRankLinear, replace_linears
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import CheckpointError

TOKENS = packed_tokens(2, 14, vocabulary=300)

#: One of each kind: tied and untied, with biases, with layers of two types, in two dtypes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tied": True}),
    "llama-bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "qwen2": ("qwen2", {}),
    "gemma3_text": ("gemma3_text", {"tied": True}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
}

#: Tries, on a checkpoint with low-rank layers, everything that runs no remote code, and says what each raised.
TRAPS = """
import json
from transformers import AutoConfig, AutoModelForCausalLM, AutoModel, pipeline
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

path = sys.argv[2]
tries = {
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(path),
    "AutoModelForCausalLM, no code": lambda: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False),
    "AutoModel": lambda: AutoModel.from_pretrained(path),
    "AutoConfig": lambda: AutoConfig.from_pretrained(path),
    "LlamaForCausalLM": lambda: LlamaForCausalLM.from_pretrained(path),
    "LlamaModel": lambda: LlamaModel.from_pretrained(path),
    "LlamaConfig": lambda: LlamaConfig.from_pretrained(path),
    "pipeline": lambda: pipeline("text-generation", model=path),
}
traps = {}
for name, attempt in tries.items():
    try:
        traps[name] = ["loaded", type(attempt()).__name__]
    except Exception as error:
        traps[name] = ["raised", " ".join(str(error).split())]
"""

#: Loads with remote code where layer_surgery is not installed, and writes logits and generated tokens beside it.
LOADS = """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

def load(where, **options):
    return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, **options).eval()

results = {}
ids = load_file(sys.argv[1])["ids"]
for path in map(Path, sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    result = {"keys": {kind: sorted(map(str, keys)) for kind, keys in info.items()}, "dtype": str(model.dtype)}
    result["class"], result["parameters"] = type(model).__name__, model.num_parameters()
    with torch.no_grad():
        out = {"logits": model.eval()(ids, use_cache=False).logits}
        # In float32: in bfloat16 the two largest logits are often equal.
        wide, options = load(path, dtype=torch.float32), dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        mask = torch.ones_like(ids)
        out["cached"] = wide.generate(ids, attention_mask=mask, **options)
        out["uncached"] = wide.generate(ids, attention_mask=mask, use_cache=False, **options)
        padded, mask = ids.clone(), mask.clone()
        padded[1, :5], mask[1, :5] = 0, 0
        out["padded"] = wide.generate(padded, attention_mask=mask, **options)[1, 5:]
        out["single"] = wide.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], **options)[0]
        model.save_pretrained(path / "again")
        out["again"] = load(path / "again")(ids, use_cache=False).logits
        half = load(path, dtype=torch.bfloat16)
        result["bfloat16"] = str({p.dtype for p in half.parameters()})
        out["half"] = half(ids, use_cache=False).logits
    text = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
    result["text"] = text("the quick", do_sample=False, max_new_tokens=4)[0]["generated_text"]
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, path / "out.safetensors")
    results[path.name] = result
print("\\n" + json.dumps({"loads": results, "traps": traps}))
"""


def low_rank_checkpoint(directory: Path, name: str) -> Path:
    """Compress a tiny model of which one layer goes and two become low-rank, one of these in part only."""
    model_type, fields = FAMILIES[name]
    path = saved_model(directory / f"{name} before", model_type, layers=5, **fields)
    linears = full_ranks(open_checkpoint(path), 2)
    ranks = {linear: rank // 2 for linear, rank in linears.items()}
    partial = {linear: rank // 3 for linear, rank in linears.items() if "q_proj" in linear or linear.startswith("mlp")}
    plan = directory / f"{name}.json"
    plan.write_text(json.dumps(make_test_plan(5, removed=[1], low_rank={2: ranks, 3: partial}).to_dict()))
    layer_surgery.compress(path, directory / name, plan=plan, eval_data=None)
    return directory / name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("low rank")
    return {name: low_rank_checkpoint(directory, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def processed(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Try and load every checkpoint in one process where this package cannot be imported."""
    home = tmp_path_factory.mktemp("home")
    save_file({"ids": TOKENS.token_ids}, home / "ids.safetensors")
    results = run_stock_script(TRAPS + LOADS, home / "ids.safetensors", *checkpoints.values(), home=home)
    for name, path in checkpoints.items():
        results["loads"][name] |= load_file(path / "out.safetensors")
    assert isinstance(results, dict)
    return results


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest, processed: dict[str, Any], checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Return what stock transformers make of a checkpoint, and its `path`, for each in turn."""
    return processed["loads"][request.param] | {"path": checkpoints[request.param]}


@pytest.fixture
def low_rank(tmp_path: Path) -> Path:
    """Return a low-rank llama that a test may change."""
    return low_rank_checkpoint(tmp_path, "llama")


# Without this package


@pytest.mark.slow
def test_stock_transformers_load_every_tensor_and_as_many_parameters_as_planned(stock: dict[str, Any]) -> None:
    assert {kind: keys for kind, keys in stock["keys"].items() if keys} == {}
    assert stock["class"] == "LayerSurgeryForCausalLM"
    report = json.loads((stock["path"] / "surgery.json").read_text())
    assert stock["parameters"] == report["after"]["parameters"] == report["plan"]["parameters"]


@pytest.mark.slow
def test_stock_logits_are_those_of_load_and_of_the_streamed_model_bit_for_bit(
    stock: dict[str, Any], tmp_path: Path
) -> None:
    model = layer_surgery.load(stock["path"])
    ours = logits(model, TOKENS.token_ids)
    assert stock["logits"].dtype == ours.dtype
    assert stock["dtype"] == str(model.dtype)
    assert torch.equal(stock["logits"], ours)
    assert len(ours.unique()) > 1000
    walked = walked_logits(streamed(stock["path"], dtype=ours.dtype), TOKENS, settings(tmp_path))
    assert torch.equal(walked, stock["logits"])


@pytest.mark.slow
def test_generation_does_not_depend_on_a_cache_nor_on_left_padding(stock: dict[str, Any]) -> None:
    assert stock["cached"].shape == (2, 14 + 8)
    assert torch.equal(stock["cached"], stock["uncached"])
    assert len(stock["single"]) == 9 + 8
    assert torch.equal(stock["padded"], stock["single"])


@pytest.mark.slow
def test_saved_again_by_stock_transformers_it_is_the_same_model(stock: dict[str, Any]) -> None:
    assert torch.equal(stock["again"], stock["logits"])
    again = layer_surgery.load(stock["path"] / "again")
    assert torch.equal(logits(again, TOKENS.token_ids), stock["logits"])


@pytest.mark.slow
def test_it_loads_in_another_dtype(stock: dict[str, Any]) -> None:
    assert stock["bfloat16"] == "{torch.bfloat16}"
    assert stock["half"].dtype == torch.bfloat16
    difference = (stock["half"].float() - stock["logits"].float()).abs().max()
    assert difference < 0.2 * stock["logits"].float().abs().max()


@pytest.mark.slow
def test_it_works_in_a_text_generation_pipeline(stock: dict[str, Any]) -> None:
    assert stock["text"].startswith("the quick")
    assert len(stock["text"]) > len("the quick")


def test_the_blocker_of_these_tests_blocks(tmp_path: Path) -> None:
    script = "import json\ntry:\n    import layer_surgery.api\nexcept ImportError:\n    print(json.dumps('blocked'))"
    assert run_stock_script(script, home=tmp_path) == "blocked"
    assert "layer_surgery" in WITHOUT_LAYER_SURGERY


# With this package


def test_what_was_evaluated_is_what_was_saved(tmp_path: Path) -> None:
    text = text_file(tmp_path / "text.txt")
    options: dict[str, Any] = {"eval_data": [text], "sequence_length": 16}
    path = saved_model(tmp_path / "model")
    report = layer_surgery.compress(path, tmp_path / "output", layers=[1, 2], keep=0.3, **options)
    again = layer_surgery.evaluate(tmp_path / "output", **options).model
    assert again == report.after
    assert report.after.perplexity[str(text)].value != report.before.perplexity[str(text)].value


@pytest.mark.parametrize("name", ["llama", "starcoder2"])
def test_a_low_rank_layer_is_its_factors_multiplied_out_and_its_bias(checkpoints: dict[str, Path], name: str) -> None:
    model = layer_surgery.load(checkpoints[name])
    linear = decoder_layers(model)[1].get_submodule("self_attn.q_proj")
    assert isinstance(linear, LowRankLinear)
    assert (linear.bias is not None and bool(linear.bias.any())) is (name == "starcoder2")
    dense = linear.out_factor.weight @ linear.in_factor.weight
    x = torch.randn(3, linear.in_features)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, dense, linear.bias), rtol=1e-4, atol=1e-5)
    assert linear.rank == model.config.low_rank["model.layers.1.self_attn.q_proj"] < min(dense.shape)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "starcoder2", "phi3"])
def test_at_full_rank_it_is_the_original_model(tmp_path: Path, model_type: str) -> None:
    original = model_with_vocabulary(model_type, dtype=torch.float64)
    path = saved_model(tmp_path / "model", model=original)
    plan = make_test_plan(4, low_rank={index: full_ranks(open_checkpoint(path), index) for index in (1, 2)})
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    options: dict[str, Any] = {"plan": tmp_path / "plan.json", "eval_data": None, "dtype": "float32"}
    layer_surgery.compress(path, tmp_path / "output", **options)
    loaded = layer_surgery.load(tmp_path / "output")
    assert len(loaded.config.low_rank) == 2 * len(full_ranks(open_checkpoint(path), 1))
    expected = logits(original, TOKENS.token_ids)
    torch.testing.assert_close(logits(loaded, TOKENS.token_ids), expected, rtol=1e-3, atol=1e-3)


def test_load_takes_dtype_and_further_options(low_rank: Path) -> None:
    model = layer_surgery.load(low_rank, dtype=torch.float64, attn_implementation="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"


def test_load_opens_plain_checkpoints_too(tmp_path: Path) -> None:
    model = model_with_vocabulary()
    path = saved_model(tmp_path / "model", model=model)
    loaded = layer_surgery.load(path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, TOKENS.token_ids), logits(model, TOKENS.token_ids))


def test_load_never_runs_code_of_the_checkpoint(low_rank: Path) -> None:
    expected = logits(layer_surgery.load(low_rank), TOKENS.token_ids)
    ran = low_rank / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nraise RuntimeError('remote code was run')\n"
    (low_rank / "modeling_layer_surgery.py").write_text(code)
    assert torch.equal(logits(layer_surgery.load(low_rank), TOKENS.token_ids), expected)
    assert not ran.exists()


def test_saved_again_with_this_package_it_is_the_same_model(low_rank: Path, tmp_path: Path) -> None:
    model = layer_surgery.load(low_rank)
    model.save_pretrained(tmp_path / "again")
    assert {"config.json", "model.safetensors", "modeling_layer_surgery.py"} <= listing(tmp_path / "again").keys()
    again = layer_surgery.load(tmp_path / "again")
    assert torch.equal(logits(again, TOKENS.token_ids), logits(model, TOKENS.token_ids))
    before, after = (json.loads((d / "config.json").read_text()) for d in (low_rank, tmp_path / "again"))
    assert {name for name in before if name != "base_config" and before[name] != after[name]} == set()
    assert set(before["base_config"]) <= set(after["base_config"]) | {"architectures"}


def test_pickling_its_configuration_is_not_needed_for_a_copy(low_rank: Path) -> None:
    """Libraries copy configurations, for example to change one field."""
    config = layer_surgery.load(low_rank).config
    assert copy.deepcopy(config).low_rank == config.low_rank
    assert type(config).from_dict(config.to_dict()).low_rank == config.low_rank


def test_modelling_file_imports_nothing_of_this_package(low_rank: Path) -> None:
    code = (low_rank / "modeling_layer_surgery.py").read_text()
    imports = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
    found = {line.split()[1].partition(".")[0] for line in imports}
    assert found == {"__future__", "functools", "re", "typing", "torch", "transformers"}


def test_its_weight_is_the_product_of_the_factors_and_lets_gradients_through() -> None:
    """State-space layers pass the weight of a linear to a kernel and do not call the linear."""
    linear = LowRankLinear(6, 4, 2, bias=False, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.linear(x, linear.weight), linear(x))
    linear.weight.sum().backward()
    assert all(part.weight.grad is not None for part in (linear.in_factor, linear.out_factor))
    assert {name for name, _ in linear.named_parameters()} == {"in_factor.weight", "out_factor.weight"}


def test_a_transposed_linear_of_gpt2_is_replaced_by_one_with_the_same_ends() -> None:
    module = nn.Module()
    module.linear = Conv1D(5, 3)  # from 3 to 5
    replace_linears(module, {"linear": 2})
    assert module.linear.in_factor.weight.shape == (2, 3)
    assert module.linear.out_factor.weight.shape == (5, 2)
    assert module.linear.bias.shape == (5,)
    assert module.linear(torch.zeros(1, 3)).shape == (1, 5)


def test_replacing_what_is_no_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="'0', which is a LayerNorm"):
        replace_linears(nn.Sequential(nn.LayerNorm(3)), {"0": 1})


def test_a_replaced_linear_keeps_its_bias_dtype_and_device() -> None:
    module = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 5, bias=False, device="meta"))
    replace_linears(module, {"0": 2, "1": 1})
    assert module[0].bias is not None and module[0].bias.dtype == module[0].in_factor.weight.dtype == torch.float64
    assert module[1].bias is None and module[1].out_factor.weight.is_meta
    assert tuple(module[0].in_factor.weight.shape) == (2, 3)
    assert tuple(module[0].out_factor.weight.shape) == (4, 2)


# The trap: loaded by what knows nothing of low-rank layers, it must fail and not make up weights


@pytest.mark.slow
def test_loaders_that_run_no_code_refuse_it(processed: dict[str, Any]) -> None:
    assert len(processed["traps"]) == 8
    for loader, (outcome, message) in processed["traps"].items():
        assert outcome == "raised", f"{loader}: {message}"
        assert "trust_remote_code=True" in message, loader


@pytest.mark.parametrize("part", ["in_factor", "out_factor"])
def test_a_missing_factor_is_refused(low_rank: Path, part: str) -> None:
    name = f"model.layers.2.self_attn.q_proj.{part}.weight"
    edit_tensors(low_rank, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        layer_surgery.load(low_rank)


def test_a_factor_of_another_rank_is_refused(low_rank: Path) -> None:
    config = json.loads((low_rank / "config.json").read_text())
    ranks = config["low_rank"]
    ranks["model.layers.2.self_attn.q_proj"] += 1
    edit_json(low_rank / "config.json", low_rank=ranks)
    with pytest.raises(CheckpointError, match=r"q_proj\.in_factor\.weight.* has shape"):
        layer_surgery.load(low_rank)


@pytest.mark.parametrize(
    "change",
    [
        {"base_config": None},
        {"base_model_type": None},
        {"base_model_type": "nonsense"},
        {"low_rank": None},
        {"low_rank": {"model.layers.0.mlp.no_such": 3}},
        {"low_rank": {"model.norm": 3}},
        {"low_rank": {"model.layers.2.self_attn.q_proj": "many"}},
        {"base_config": {"num_hidden_layers": "many"}},
        {"low_rank": []},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(low_rank: Path, change: dict[str, Any]) -> None:
    edit_json(low_rank / "config.json", **change)
    with pytest.raises(CheckpointError):
        layer_surgery.load(low_rank)


def test_its_perplexity_is_finite_and_of_this_model_alone(low_rank: Path, tmp_path: Path) -> None:
    result = layer_surgery.evaluate(low_rank, eval_data=[text_file(tmp_path / "text.txt")], sequence_length=16).model
    (measured,) = result.perplexity.values()
    assert math.isfinite(measured.value) and measured.value > 1
