"""Whatever is wrong with what was asked for: one sentence that says so, exit code 2, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_checkpoints import (
    VOCABULARY,
    CommandLine,
    Outcome,
    assert_refused,
    edit_json,
    edit_tensors,
    listing,
    model_with_vocabulary,
    saved_model,
    text_file,
)
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import layer_surgery
from layer_surgery.cli.main import main
from layer_surgery.errors import CheckpointError, DataError, NumericalError, PlanError, UserError

CUDA = torch.cuda.is_available()


# Options


#: Options, then what the message must hold.
WRONG_OPTIONS: list[tuple[str, ...]] = [
    ("--target-layers 0", "--target-layers is 0; allowed: 1 to 3"),
    ("--target-layers -1", "--target-layers is -1; allowed: 1 to 3"),
    ("--target-layers 4", "--target-layers is 4; allowed: 1 to 3", "the model has 4 layers"),
    ("--target-layers 40", "--target-layers is 40; allowed: 1 to 3"),
    ("--target-layers two", "--target-layers", "'two'"),
    ("--target-layers 2.5", "--target-layers", "'2.5'"),
    ("", "there is no budget: give --target-parameters", "--target-layers", "--plan"),
    ("--target-layers 2 --keep -0.1", "--keep is -0.1; allowed", "0"),
    ("--target-layers 2 --keep 1.1", "--keep is 1.1; allowed", "to 1"),
    ("--target-layers 2 --keep nan", "--keep is nan; allowed"),
    ("--target-layers 2 --keep inf", "--keep is inf; allowed"),
    ("--target-layers 2 --keep some", "--keep", "'some'"),
    ("--target-layers 2 --keep 0.1 --target-parameters 0.5", "give only one"),
    ("--target-layers 2 --keep 0.0001", "cannot be reached", "reachable: --keep 0.", "to 1", "--keep 0 "),
    ("--target-layers 2 --target-parameters 0.1", "cannot be reached", "reachable: --target-parameters 0."),
    ("--target-layers 2 --target-parameters 0", "--target-parameters is 0.0; allowed"),
    ("--target-layers 2 --target-parameters 1.5", "--target-parameters is 1.5; allowed"),
    ("--target-layers 2 --target-parameters nan", "--target-parameters is nan; allowed"),
    ("--target-layers 2 --method remove --keep 0.1", "--method remove keeps nothing", "--keep"),
    ("--target-layers 2 --method remove --target-parameters 0.5", "--method remove keeps nothing"),
    ("--target-layers 2 --scorer block_influenze", "unknown scorer", "Did you mean 'block_influence'?", "taylor"),
    ("--target-layers 2 --method graps", "unknown", "Did you mean 'grasp'?", "svd"),
    ("--target-layers 2 --refit-scope some", "--refit-scope is 'some'; allowed: operated, all"),
    ("--target-layers 2 --keep 0 --refit-scope operated", "nothing becomes low-rank here", "--no-refit"),
    ("--target-layers 2 --method laco --refit --refit-scope operated", "nothing becomes low-rank here"),
    ("--target-layers 2 --refit-general 1.5", "--refit-general is 1.5; allowed: a fraction from 0 to 1"),
    ("--target-layers 2 --refit-general nan", "--refit-general is nan; allowed"),
    ("--target-layers 2 --samples 3 --sequence-length 16", "--refit needs at least 4", "there are 3", "--no-refit"),
    ("--target-layers 2 --samples 4 --sequence-length 5", "as the model is wide, 32", "are 20", "--samples 7"),
    ("--layers 0 --method replaceme --samples 4 --sequence-length 16", "replaceme needs a layer before", "layer 0"),
    ("--layers 0,1 --method laco --samples 4 --sequence-length 16", "laco needs a layer before each", "layer 0"),
    ("--target-layers 2 --method replaceme --keep 0.1", "--method replaceme keeps nothing", "--keep"),
    ("--layers 2 --method replaceme --samples 2 --sequence-length 15", "replaceme needs at least", "--samples 3"),
    ("--layers 2 --method svd_llm --samples 1 --sequence-length 31", "--method svd_llm needs at least", "--samples 2"),
    ("--target-layers 2 --method svd --multiple 8", "--multiple is for --method mix", "leave out --method svd"),
    ("--target-layers 2 --method fisher --components heads", "--components is for --method mix"),
    ("--target-parameters 0.8 --scorer random", "--scorer random would have nothing to choose: all layers take part"),
    ("--layers 2 --scorer last", "--scorer last would have nothing to choose: --layers names the layers"),
    ("--target-layers 2 --no-refit --refit-scope operated", "--refit-scope says how to refit", "leave out --no-refit"),
    ("--target-layers 2 --method svd --refit-general 0.5", "--refit-general says how to refit", "pass --refit too"),
    ("--target-layers 2 --speed-repeats 3", "--speed-repeats only counts with --speed; add that"),
    ("--target-layers 2 --eval-data text.txt --no-eval", "--no-eval measures on no text and --eval-data names one"),
    ("--target-layers 2 --device gpu", "--device is 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
    ("--target-layers 2 --device cuda:", "--device is 'cuda:'; allowed"),
    ("--target-layers 2 --device cuda:first", "--device is 'cuda:first'; allowed"),
    ("--target-layers 2 --device cpu:x", "--device is 'cpu:x'; allowed"),
    ("--target-layers 2 --decomposition fast", "--decomposition is 'fast'; allowed: auto, exact, leading"),
    ("--target-layers 2 --dtype float8", "--dtype is 'float8'; allowed: auto, float32, bfloat16, float16"),
    ("--layers 4", "--layers names [4]", "0 to 3"),
    ("--layers -1", "--layers names [-1]", "0 to 3"),
    ("--layers 1,1", "--layers must name each layer once", "repeated: [1]"),
    ("--layers one,two", "--layers", "'one,two' is not a list of layer numbers"),
    ("--layers 1;2", "'1;2' is not a list of layer numbers"),
    ("--layers ,", "--layers", "none given"),
    ("--layers 0,1,2,3", "--layers names every layer"),
    ("--layers 1 --target-layers 2", "--layers leaves 3 of 4", "--target-layers is 2"),
    ("--target-layers 2 --samples 0", "--samples is 0; allowed: 1 or more"),
    ("--target-layers 2 --sequence-length 1", "--sequence-length is 1; allowed: 2 or more"),
    ("--target-layers 2 --sequence-length 65 --samples 1", "--sequence-length is 65", "at most 64"),
    ("--target-layers 2 --batch-size 0", "--batch-size is 0; allowed: 1 or more"),
    ("--target-layers 2 --seed -1", "--seed is -1; allowed: 0 or more"),
    ("--target-layers 2 --seed 99999999999999999999", "seed", "99999999999999999999"),
    ("--target-layers 2 --eval-windows 0", "--eval-windows is 0; allowed: 1 or more"),
    ("--target-layers 2 --nonsense", "--nonsense"),
    ("--target-layer 2", "--target-layers"),
    ("--target-layers 2 extra", "extra"),
]


@pytest.mark.parametrize(("options", "expected"), [(case[0], case[1:]) for case in WRONG_OPTIONS])
def test_a_wrong_option_is_refused(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, options: str, expected: tuple[str, ...]
) -> None:
    data = ["--calibration", text, "--eval-data", text]
    data += [] if "--sequence-length" in options else ["--sequence-length", 16]
    data += [] if "--samples" in options else ["--samples", 4]
    outcome = run("compress", model, *data, "--output", tmp_path / "new" / "output", *options.split())
    assert_refused(outcome, *expected)
    assert "stage 1" not in outcome.err  # before any work: on a large model a stage takes hours
    assert listing(tmp_path) == {}


@pytest.mark.skipif(CUDA, reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_refused(run: CommandLine, model: Path, tmp_path: Path, device: str) -> None:
    outcome = run("compress", model, "--target-layers", 2, "--device", device, "--output", tmp_path / "output")
    assert_refused(outcome, f"--device is '{device}'", "no CUDA device", "--device cpu")


def test_a_command_line_that_lacks_something_is_refused(run: CommandLine, model: Path) -> None:
    assert_refused(run("compress", model, "--target-layers", 2), "--output", "--dry-run")
    assert_refused(run("compress", "--target-layers", 2), "MODEL")
    assert_refused(run("compres"), "compres")


@pytest.mark.parametrize("unit", ["keep", "target_parameters"])
def test_the_edge_of_the_reachable_range_works(model: Path, unit: str) -> None:
    options: dict[str, Any] = {"layers": [1, 2], "method": "svd", "no_save": True, "eval_data": None}
    with pytest.raises(PlanError, match="cannot be reached") as caught:
        layer_surgery.compress(model, **options, **{unit: 0.001})
    edge = float(str(caught.value).partition(f"--{unit.replace('_', '-')} ")[2].split()[0])
    report = layer_surgery.compress(model, **options, **{unit: edge})
    assert {rank for layer in report.plan.low_rank for rank in layer.ranks.values()} <= {1, 2}
    with pytest.raises(PlanError, match="cannot be reached"):
        layer_surgery.compress(model, **options, **{unit: edge - 0.002})


# Plans


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("{'layers': []}", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no list 'layers'"),
        ('{"plan": 3}', "is not a JSON object"),
        ('{"layers": [{"index": 0, "action": "remove"}]}', "is for 1 layers, but the model has 4"),
        ('{"layers": [{"index": 0, "action": "delete"}]}', "'delete'; allowed: keep, remove, low_rank"),
        ('{"layers": [{"index": 3, "action": "keep"}]}', '"index": 0'),
        ('{"layers": [{"index": 0, "action": "low_rank", "ranks": {"mlp.up_proj": -1}}]}', "whole numbers from 0 on"),
        ('{"layers": [{"index": 0, "action": "low_rank"}]}', "0 ranks"),
        ('{"schema_version": 99, "layers": []}', "schema version 99"),
    ],
)
def test_a_wrong_plan_is_refused(
    run: CommandLine, model: Path, tmp_path: Path, content: str | None, expected: str
) -> None:
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    before = listing(tmp_path)
    outcome = run("compress", model, "--plan", plan, "--output", tmp_path / "output", "--no-eval")
    assert_refused(outcome, str(plan), expected)
    assert listing(tmp_path) == before


def test_a_plan_that_the_model_does_not_allow_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    keep: list[dict[str, Any]] = [{"index": index, "action": "keep"} for index in range(4)]
    above = {"index": 1, "action": "low_rank", "ranks": {"self_attn.k_proj": 25}}
    for layers, expected in (
        ([keep[0], above, *keep[2:]], ("rank 25 for 'self_attn.k_proj' of layer 1", "full rank, 24")),
        ([layer | {"action": "remove"} for layer in keep], ("removes every layer",)),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
        assert_refused(run("compress", model, "--plan", tmp_path / "plan.json", "--dry-run", "--no-eval"), *expected)


@pytest.mark.parametrize("options", ["--target-layers 2", "--keep 0.2", "--layers 1", "--target-parameters 0.5"])
def test_a_plan_and_a_budget_are_refused(run: CommandLine, model: Path, tmp_path: Path, options: str) -> None:
    layers = [{"index": index, "action": "remove" if index else "keep"} for index in range(4)]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    outcome = run("compress", model, "--plan", tmp_path / "plan.json", "--dry-run", *options.split())
    assert_refused(outcome, "--plan says already", options.split()[0])


# Data


def compress_with(run: CommandLine, model: Path, output: Path, *, calibration: object, **options: object) -> Outcome:
    """Run a compression that scores on `calibration`."""
    options = {"target-layers": 2, "output": output, "calibration": calibration} | options
    return run("compress", model, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\n ", "is empty"),
        ("short.txt", "one two three", "tokens, which make 0 windows"),
        ("empty.jsonl", "", "has no rows"),
        ("fields.jsonl", '{"prompt": "a", "reply": "b"}\n', "has the columns prompt, reply, but needs prompt"),
        ("missing.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n', "the field 'answer' is missing"),
        ("damaged.jsonl", '{"prompt": "a", \n', "damaged.jsonl"),
        ("number.jsonl", '{"text": 3}\n', "the field 'text' must be text"),
        ("binary.txt", b"\xff\xfe\x00\x01", "binary.txt"),
        ("data.docx", "text", "the suffix must be one of .txt"),
    ],
)
def test_unusable_calibration_data_is_refused(
    run: CommandLine, model: Path, tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = listing(tmp_path)
    outcome = compress_with(run, model, tmp_path / "output", calibration=file, sequence_length=16)
    assert_refused(outcome, str(file), expected)
    assert listing(tmp_path) == before


def test_too_short_a_text_says_how_many_tokens_it_has(run: CommandLine, model: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "text.txt", lines=5)
    outcome = compress_with(run, model, tmp_path / "output", calibration=file, samples=100, sequence_length=16)
    tokens = int(outcome.err.partition(" has ")[2].split()[0])
    assert 30 < tokens < 100
    assert_refused(outcome, f"make {tokens // 16} windows", f"lower --samples to at most {tokens // 16}")
    limit = {"samples": tokens // 16, "sequence_length": 16, "eval_data": file}
    assert compress_with(run, model, tmp_path / "output", calibration=file, **limit).code == 0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("wikitex2", "Did you mean 'wikitext2'?"),
        ("bundeld", "Did you mean 'bundled'?"),
        ("nowhere.txt", "there is no file nowhere.txt"),
        ("./nowhere.jsonl", "there is no file"),
        ("", "'' is neither a file nor a hub data set"),
    ],
)
@pytest.mark.parametrize("option", ["calibration", "eval_data"])
def test_an_unknown_data_set_is_refused(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, option: str, source: str, expected: str
) -> None:
    data: dict[str, object] = {"calibration": text, "samples": 4, "sequence_length": 16} | {option: source}
    assert_refused(compress_with(run, model, tmp_path / "output", **data), expected)  # type: ignore[arg-type]
    assert listing(tmp_path) == {}


def test_a_folder_of_data_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    assert_refused(compress_with(run, model, tmp_path / "output", calibration=tmp_path), "is a folder; pass one file")


def test_an_unknown_column_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"body": "one two"}\n')
    outcome = compress_with(run, model, tmp_path / "output", calibration=tmp_path / "data.jsonl", text_column="bodi")
    assert_refused(outcome, "no column 'bodi' (--text-column)", "Did you mean 'body'?")


def test_an_example_that_is_too_long_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "answer": "two"}, {"prompt": "one " * 20, "answer": "two"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"calibration": tmp_path / "data.jsonl", "sequence_length": 16, "samples": 1}
    outcome = compress_with(run, model, tmp_path / "output", **options)
    assert_refused(outcome, "example 2 has", "more than --sequence-length 16")


# Models


Damage = Callable[[Path], Any]
UP = "model.layers.0.mlp.up_proj"


def removed(pattern: str) -> Damage:
    return lambda path: [file.unlink() for file in path.glob(pattern)]


def written(name: str, content: str) -> Damage:
    return lambda path: (path / name).write_text(content)


def shortened(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-40])


def config(**changes: Any) -> Damage:
    return lambda path: edit_json(path / "config.json", **changes)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda path: edit_tensors(path, edit)  # type: ignore[arg-type]


def both(first: Damage, second: Damage) -> Damage:
    return lambda path: (first(path), second(path))


def real_adapter(path: Path) -> None:
    """What PEFT saves, with the tokenizer beside it as trainers do."""
    chosen = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(path), chosen)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (path / name).unlink()
    lora.save_pretrained(path)


def multimodal(path: Path) -> None:
    text = {**json.loads((path / "config.json").read_text()), "model_type": "gemma3_text"}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (path / "config.json").write_text(json.dumps(whole))


ADAPTER = written("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "someone/model"}')
MULTIMODAL_THAT_LOADS = '{"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}'
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
UNQUANTISED = "operate on the unquantised checkpoint"

DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (removed("config.json"), "has no config.json"),
    "damaged config": (shortened("config.json"), "config.json is damaged"),
    "config is a list": (written("config.json", "[1]"), "config.json is damaged"),
    "config without type": (config(model_type=None), "has no model_type"),
    "config of impossible sizes": (config(num_hidden_layers="four"), "config.json"),
    "config of unknown type": (
        config(model_type="llamma"),
        "(model type `llamma`); correct it, or install a version of transformers that knows it",
    ),
    "config of another type": (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "lacks "),
    "more layers": (config(num_hidden_layers=5), "'model.layers.4.input_layernorm.weight'"),
    "fewer layers": (
        config(num_hidden_layers=3),
        "has weights for more layers than its config.json lists (num_hidden_layers is 3, and there is 'model",
    ),
    "other width": (config(hidden_size=36), "has shape"),
    "without tensor": (tensors(lambda found: found.pop("model.norm.weight")), "'model.norm.weight'"),
    "with tensor": (tensors(lambda found: found.update({"adapter.weight": torch.zeros(2)})), "'adapter.weight'"),
    "truncated": (shortened("model.safetensors"), "model.safetensors is truncated or damaged"),
    "no weights": (removed("model.safetensors"), "has no model.safetensors"),
    "adapter": (both(removed("*"), ADAPTER), "is a PEFT adapter for someone/model, not a model; merge it"),
    "adapter beside a configuration": (
        both(removed("model.safetensors"), ADAPTER),
        "is a PEFT adapter for someone/model, not a model; merge it",
    ),
    "real adapter": (real_adapter, "is a PEFT adapter for "),
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        f"is quantised (gptq); {UNQUANTISED}",
    ),
    "fp8": (config(quantization_config=FP8), f"is quantised (fp8); {UNQUANTISED}"),
    "modelopt beside": (
        written("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
        f"is quantised (modelopt); {UNQUANTISED}",
    ),
    "awq beside": (written("quant_config.json", '{"w_bit": 4}'), f"is quantised (awq); {UNQUANTISED}"),
    "gptq tensors": (
        tensors(lambda found: found.update({f"{UP}.qweight": found.pop(f"{UP}.weight").to(torch.int32)})),
        f"is quantised (it has '{UP}.qweight'); {UNQUANTISED}",
    ),
    "fp8 tensors": (
        tensors(lambda found: found.update({f"{UP}.weight": found[f"{UP}.weight"].to(torch.float8_e4m3fn)})),
        f"is quantised ('{UP}.weight' is float8_e4m3fn)",
    ),
    "shared keys and values": (
        config(
            model_type="gemma4_text",
            architectures=None,
            num_kv_shared_layers=1,
            layer_types=["full_attention"] * 4,
        ),
        "layers that use the keys and values of earlier ones (num_kv_shared_layers is 1)",
    ),
    "multimodal": (
        multimodal,
        "is multimodal (architectures: Gemma3ForConditionalGeneration, model_type: gemma3; parts: text",
    ),
    "multimodal that loads as a causal lm": (
        written("config.json", MULTIMODAL_THAT_LOADS),
        "is multimodal (architectures: Qwen3_5ForConditionalGeneration",
    ),
    "encoder with a head": (
        config(model_type="bert", architectures=["BertLMHeadModel"]),
        "is not a causal language model (architectures: BertLMHeadModel, model_type: bert)",
    ),
    "no tokenizer": (removed("tokenizer*"), "tokenizer"),
    "damaged tokenizer": (written("tokenizer.json", "{"), "tokenizer"),
}


@pytest.mark.parametrize("command", ["compress", "score", "evaluate"])
@pytest.mark.parametrize("name", DAMAGES)
def test_an_unusable_model_is_refused(
    run: CommandLine, model: Path, text: Path, tmp_path: Path, command: str, name: str
) -> None:
    path = shutil.copytree(model, tmp_path / "model")
    damage, expected = DAMAGES[name]
    damage(path)
    before = listing(tmp_path)
    arguments: list[Any] = {
        "compress": ["--target-layers", 2, "--calibration", text, "--samples", 4, "--output", tmp_path / "output"],
        "score": ["--calibration", text, "--samples", 4],
        "evaluate": ["--eval-data", text],
    }[command]
    assert_refused(run(command, path, *arguments, "--sequence-length", 16), expected)
    assert listing(tmp_path) == before


def test_a_missing_model_and_a_file_for_a_model_are_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    options = ("--target-layers", 2, "--output", tmp_path / "some" / "output")
    assert_refused(run("compress", tmp_path / "nowhere", *options), "no such model", "nowhere")
    assert_refused(run("compress", model / "model.safetensors", *options), "is a file", "directory")
    assert listing(tmp_path) == {}


def test_encoders_without_a_head_and_with_a_decoder_are_refused(run: CommandLine, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "bert")
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    for name, model_class in (("bert", "BertModel"), ("t5", "T5ForConditionalGeneration")):
        assert_refused(run("score", tmp_path / name), "is not a causal language model", model_class)


def test_an_unsupported_architecture_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    config = AutoConfig.for_model("xlm", vocab_size=64, emb_dim=16, n_layers=2, n_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    for given in (model, tmp_path / "model"):
        with pytest.raises(CheckpointError, match=r"'xlm' is not supported.*cannot be guessed.*: .*llama.*qwen3"):
            layer_surgery.compress(given, tmp_path / "output", layers=[1])


class _MakesAFile:
    """A pickle that shows that it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self._path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_never_opened(run: CommandLine, model: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(model, tmp_path / "model")
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(_MakesAFile(tmp_path / "opened")))
    outcome = run("compress", path, "--target-layers", 2, "--output", tmp_path / "output")
    assert_refused(outcome, name, "pickle", "save_pretrained")
    with pytest.raises(CheckpointError, match="pickle"):
        layer_surgery.load(path)
    assert not (tmp_path / "opened").exists()
    pickle.loads((path / name).read_bytes())
    assert (tmp_path / "opened").exists(), "the pickle of this test does nothing"


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = shutil.copytree(model, tmp_path / "model")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(path / "config.json", model_type="own", auto_map=auto_map, architectures=["OwnForCausalLM"])
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nraise RuntimeError('it ran')\n"
    for name in ("configuration_own.py", "modeling_own.py"):
        (path / name).write_text(code)
    with pytest.raises(CheckpointError, match="it ran" if trusted else "needs Python code.*--trust-remote-code"):
        layer_surgery.compress(path, tmp_path / "output", layers=[1], keep=0, eval_data=None, trust_remote_code=trusted)
    assert (tmp_path / "ran").exists() is trusted
    assert not (tmp_path / "output").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(run: CommandLine, text: Path, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", vocab_size=100)
    outcome = compress_with(run, path, tmp_path / "output", calibration=text, samples=4, sequence_length=16)
    assert_refused(outcome, "the tokenizer does not fit the model", "100 rows")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(
    run: CommandLine, text: Path, tmp_path: Path, name: str, value: float
) -> None:
    broken = model_with_vocabulary()
    with torch.no_grad():
        broken.get_parameter(name)[3, 4] = value
    path = saved_model(tmp_path / "model", model=broken)
    before = listing(tmp_path)
    outcome = compress_with(run, path, tmp_path / "output", calibration=text, samples=4, sequence_length=16)
    assert_refused(outcome, f"tensor '{name}'", "NaN or Inf", code=1)
    assert listing(tmp_path) == before


# The errors themselves


def test_mistakes_of_the_user_are_value_errors_too() -> None:
    for kind in (CheckpointError, DataError, PlanError):
        assert issubclass(kind, UserError) and issubclass(kind, ValueError)
        assert kind.exit_code == 2
    assert NumericalError.exit_code == 1


def test_everything_is_checked_before_any_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last text to be evaluated is wrong: neither the hash nor a layer may have been computed."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("layer_surgery.checkpoint.checkpoint.Checkpoint.sha256", fail)
    monkeypatch.setattr("layer_surgery.walk.streamed.StreamedModel.__init__", fail)
    data: dict[str, Any] = {"calibration": text, "eval_data": [text, tmp_path / "nowhere.txt"]}
    with pytest.raises(DataError, match="there is no file"):
        layer_surgery.compress(model, tmp_path / "output", target_layers=2, samples=4, sequence_length=16, **data)


def test_a_traceback_is_shown_only_when_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", f"layer-surgery compress {model} --target-layers 9 --dry-run --debug".split())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(PlanError, match="--target-layers is 9"):
        main()
