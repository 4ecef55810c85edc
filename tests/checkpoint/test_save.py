"""What is written: an ordinary checkpoint, whole or not at all, that every tool of the trade can load."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import listing, load_stock, logits, model_with_vocabulary, saved_model, tensors_of, text_file
from tiny_models import decoder_layers, without_layers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.output import staged_directory, writing
from layer_surgery.checkpoint.save import (
    StreamedSafetensors,
    check_saved,
    save_checkpoint,
    split_shards,
    write_shards,
)
from layer_surgery.checkpoint.tensors import TensorSpec
from layer_surgery.errors import CheckpointError, LayerSurgeryError, OutputError
from layer_surgery.progress import no_progress

IDS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(0))
KEPT = pytest.mark.parametrize("keep", [0, 0.3], ids=["removed", "low-rank"])
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def remove(model: Path | PreTrainedModel, output: Path, layers: tuple[int, ...] = (1, 2), **options: Any) -> Path:
    """Remove layers outright, leave the others as they are, and return the output directory."""
    layer_surgery.compress(model, output, layers=layers, keep=0, refit=False, eval_data=None, **options)
    return output


def compress(path: Path, output: Path, keep: float = 0.3, layer: int = 1) -> Path:
    """Remove a layer, or make it low-rank, and return the output directory."""
    layer_surgery.compress(path, output, layers=[layer], keep=keep, method="svd", eval_data=None)
    return output


# Pure removal: an ordinary checkpoint


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "olmo3", "smollm3", "phi3", "glm4", "starcoder2", "cohere"],
)
def test_removal_loads_in_stock_transformers_as_the_model_without_those_layers(tmp_path: Path, model_type: str) -> None:
    original = model_with_vocabulary(model_type, layers=5)
    loaded, info = load_stock(remove(saved_model(tmp_path / "model", model=original), tmp_path / "output"))
    assert {kind: list(keys) for kind, keys in info.items() if len(keys)} == {}
    assert type(loaded) is type(original)
    assert len(decoder_layers(loaded)) == loaded.config.num_hidden_layers == 3
    assert torch.equal(logits(loaded, IDS), logits(without_layers(original, [1, 2]), IDS))


def test_removal_renumbers_the_layers(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", layers=5)
    before, after = tensors_of(path), tensors_of(remove(path, tmp_path / "output", (0, 2)))
    for new, old in enumerate([1, 3, 4]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])
    assert not any(name.startswith("model.layers.3.") for name in after)


def test_removal_keeps_the_model_type_and_needs_no_code(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", "qwen2")
    output = remove(path, tmp_path / "output")
    before, after = (json.loads((d / "config.json").read_text()) for d in (path, output))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert "auto_map" not in after
    assert not list(output.glob("*.py"))


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_removal_cuts_the_types_of_layers(tmp_path: Path, model_type: str) -> None:
    original = model_with_vocabulary(model_type, layers=6)
    output = remove(saved_model(tmp_path / "model", model=original), tmp_path / "output", (0, 3))
    types = getattr(original.config, "layer_types", None)
    assert load_stock(output)[0].config.num_hidden_layers == 4
    if types is not None:
        assert json.loads((output / "config.json").read_text())["layer_types"] == [types[i] for i in (1, 2, 4, 5)]


@KEPT
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_stay_tied_and_are_stored_once_or_stay_untied(tmp_path: Path, keep: float, tied: bool) -> None:
    path = saved_model(tmp_path / "model", tied=tied)
    output = compress(path, tmp_path / "output", keep)
    model = layer_surgery.load(output)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert ("lm_head.weight" not in tensors_of(output)) is tied
    assert tied or torch.equal(head, tensors_of(path)["lm_head.weight"])


def test_a_head_that_is_stored_although_tied_is_tied_all_the_same(tmp_path: Path) -> None:
    """Some published checkpoints hold the tied head a second time."""
    path = saved_model(tmp_path / "model", tied=True)
    tensors = tensors_of(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    model, info = load_stock(remove(path, tmp_path / "output"))
    assert not info["missing_keys"]
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@KEPT
def test_output_has_the_dtype_of_the_input(tmp_path: Path, dtype: torch.dtype, keep: float) -> None:
    output = compress(saved_model(tmp_path / "model", dtype=dtype), tmp_path / "output", keep)
    assert {tensor.dtype for tensor in tensors_of(output).values()} == {dtype}
    assert layer_surgery.load(output).dtype == dtype


def test_what_is_not_operated_on_is_copied_bit_for_bit(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", dtype=torch.bfloat16)
    before, after = tensors_of(path), tensors_of(compress(path, tmp_path / "output", layer=3))
    untouched = [name for name in before if not name.startswith("model.layers.3.") or "norm" in name]
    assert len(untouched) > 25
    assert all(torch.equal(before[name], after[name]) for name in untouched)


# Shards


def test_a_sharded_input_gives_a_sharded_output_with_an_index(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", max_shard_size="30KB")
    output = remove(path, tmp_path / "output")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = {file.name for file in output.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) > 2
    for name in shards:
        with safe_open(output / name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(output).values())
    loaded, info = load_stock(output)
    assert not any(len(keys) for keys in info.values())
    assert torch.equal(logits(loaded, IDS), logits(load_stock(remove(path, tmp_path / "again"))[0], IDS))


@pytest.mark.parametrize("keep", [0, 0.5], ids=["removed", "low-rank"])
@pytest.mark.parametrize("size", ["20KB", "45KB", "100KB"])
def test_no_shard_is_larger_than_the_inputs_largest(tmp_path: Path, size: str, keep: float) -> None:
    path = saved_model(tmp_path / "model", max_shard_size=size)
    compress(path, tmp_path / "output", keep)
    largest = [
        max(sum(tensor.nbytes for tensor in load_file(file).values()) for file in directory.glob("*.safetensors"))
        for directory in (path, tmp_path / "output")
    ]
    assert largest[1] <= largest[0]


def test_a_single_file_gives_a_single_file(tmp_path: Path) -> None:
    output = remove(saved_model(tmp_path / "model"), tmp_path / "output")
    assert [file.name for file in output.glob("*.safetensors*")] == ["model.safetensors"]


def test_shards_are_cut_where_the_next_tensor_would_not_fit() -> None:
    specs = {name: TensorSpec((size,), torch.uint8) for name, size in zip("abcde", (4, 4, 3, 20, 1), strict=True)}
    assert split_shards(specs, 8) == [["a", "b"], ["c"], ["d"], ["e"]]


# What travels with the weights


@KEPT
def test_tokenizer_template_and_generation_settings_are_copied_byte_for_byte(tmp_path: Path, keep: float) -> None:
    path = saved_model(tmp_path / "model")
    (path / "LICENSE").write_text("Do as you like.\r\n")
    (path / "notes.md").write_text("stays where it is")
    compress(path, tmp_path / "output", keep)
    for name in (*COMPANIONS, "LICENSE"):
        assert (tmp_path / "output" / name).read_bytes() == (path / name).read_bytes(), name
    assert not (tmp_path / "output" / "notes.md").exists()


def test_copied_settings_work(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    output = remove(path, tmp_path / "output")
    chat = [{"role": "user", "content": "hi"}]
    texts = [AutoTokenizer.from_pretrained(d).apply_chat_template(chat, tokenize=False) for d in (path, output)]
    assert texts[0] == texts[1] == "<|start|>user\nhi<|end|>\n"
    assert GenerationConfig.from_pretrained(output).max_new_tokens == 7


def test_settings_of_a_model_in_memory_are_saved(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, _ = load_stock(path)
    output = remove(model, tmp_path / "output", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(output)("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    assert GenerationConfig.from_pretrained(output).max_new_tokens == 7
    assert (output / "chat_template.jinja").read_text() == tokenizer.chat_template


# The writer


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_streamed_file_is_read_by_the_library_in_any_order_of_writing(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "turned": torch.randn(4, 5).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 2),
        "half": torch.randn(7).to(torch.bfloat16),
    }
    with StreamedSafetensors(tmp_path / "file.safetensors", specs_of(tensors)) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    with safe_open(tmp_path / "file.safetensors", framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_streamed_tensors_are_aligned(tmp_path: Path) -> None:
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(2), "half": torch.zeros(1).half()}
    with StreamedSafetensors(tmp_path / "file", specs_of(tensors)) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[n]["data_offsets"][0] % t.dtype.itemsize == 0 for n, t in tensors.items())


def test_a_tensor_of_another_shape_or_dtype_than_announced_is_refused(tmp_path: Path) -> None:
    for tensor in (torch.zeros(3), torch.zeros(2).half()):
        with (
            pytest.raises(LayerSurgeryError, match="announced"),
            StreamedSafetensors(tmp_path / "file", {"t": TensorSpec((2,), torch.float32)}) as file,
        ):
            file.write("t", tensor)


def test_a_tensor_that_is_never_written_is_noticed(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.zeros(1), "b": torch.zeros(1)})
    with (
        pytest.raises(LayerSurgeryError, match="1 tensors were announced and never written"),
        StreamedSafetensors(tmp_path / "file", specs) as file,
    ):
        file.write("a", torch.zeros(1))


def test_tensors_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved_model(tmp_path / "model"))
    read, asked = checkpoint.source.read, []

    def note(names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        asked.append(list(names))
        return read(names, device)

    monkeypatch.setattr(checkpoint.source, "read", note)
    (tmp_path / "output").mkdir()
    write_shards(checkpoint, tmp_path / "output", shard_bytes=1 << 30, progress=no_progress)
    assert sorted(names[0] for names in asked) == sorted(checkpoint.source.specs)
    assert {len(names) for names in asked} == {1}


# All or nothing


def stage(output: Path, *, overwrite: bool = True, error: type[BaseException] | None = None) -> None:
    """Write a file into a staged directory, and raise the error behind it."""
    with staged_directory(output, overwrite=overwrite) as staging:
        (staging / "new").write_text("new")
        if error:
            raise error


def test_staged_directory_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "output"
    with staged_directory(output, overwrite=False) as staging:
        (staging / "file").write_text("x")
        assert not output.exists()
    assert listing(tmp_path).keys() == {"new", "new/output", "new/output/file"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("parent", [".", "new/folders"])
def test_staged_directory_leaves_nothing_when_the_work_fails(
    tmp_path: Path, error: type[BaseException], parent: str
) -> None:
    with pytest.raises(error):
        stage(tmp_path / parent / "output", overwrite=False, error=error)
    assert listing(tmp_path) == {}


def test_folders_that_were_there_before_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError):
        stage(tmp_path / "there" / "new" / "output", overwrite=False, error=ValueError)
    assert listing(tmp_path).keys() == {"there"}


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """Return an output directory that holds a model, in a folder of its own."""
    output = tmp_path / "folder" / "output"
    output.mkdir(parents=True)
    (output / "surgery.json").write_text('{"files": {}}')
    return output


def test_staged_directory_replaces_only_at_the_end(existing: Path) -> None:
    with staged_directory(existing, overwrite=True) as staging:
        (staging / "new").write_text("new")
        assert listing(existing).keys() == {"surgery.json"}
    assert listing(existing.parent).keys() == {"output", "output/new"}


def test_an_existing_output_is_kept_without_overwrite(existing: Path) -> None:
    before = listing(existing.parent)
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
        stage(existing, overwrite=False)
    assert listing(existing.parent) == before


@pytest.mark.parametrize(
    ("file", "refusal"),
    [
        ("chapter.tex", r"holds chapter\.tex.* is not replaced, even with --overwrite"),
        ("analyse.py", r"holds analyse\.py"),
        ("checkpoint-500/model.safetensors", "holds checkpoint-500"),
    ],
)
def test_an_output_with_something_of_the_users_is_never_replaced(existing: Path, file: str, refusal: str) -> None:
    (existing / file).parent.mkdir(exist_ok=True)
    (existing / file).write_text("a week of training")
    before = listing(existing)
    with pytest.raises(OutputError, match=refusal):
        remove(saved_model(existing.parent / "model"), existing, overwrite=True)
    assert listing(existing) == before


def test_a_model_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    other = saved_model(tmp_path / "other")
    before = listing(other)
    with pytest.raises(OutputError, match=r"has no surgery\.json"):
        remove(saved_model(tmp_path / "model"), other, overwrite=True)
    assert listing(other) == before


def test_a_folder_of_chat_templates_travels_and_may_be_replaced(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for _ in range(2):
        remove(path, tmp_path / "output", overwrite=True)
    assert (tmp_path / "output" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("output", "refusal"),
    [
        ("file", "is a file or a link"),
        ("other link", "is a file or a link"),
        ("run/model", "is the model itself"),
        ("run/model/../model", "is the model itself"),
        ("link/run/model", "is the model itself"),
        ("run", "holds the model"),  # a training run's directory is a model too, and holds its checkpoints
    ],
)
def test_files_links_and_the_model_itself_are_never_replaced(tmp_path: Path, output: str, refusal: str) -> None:
    path = saved_model(saved_model(tmp_path / "run") / "model")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other link").symlink_to(saved_model(tmp_path / "other"))
    (tmp_path / "link").symlink_to(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=refusal):
        remove(path, tmp_path / output, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("output", ["file/output", "/proc/output", "/dev/null/output", "x" * 250], ids=lambda o: o[:20])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, output: str) -> None:
    path = saved_model(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        remove(path, tmp_path / output)


def compress_over(path: Path, output: Path, text: Path) -> None:
    """Compress with every stage: scoring, method, evaluation."""
    data = {"calibration": text, "eval_data": [text], "samples": 4, "sequence_length": 16}
    layer_surgery.compress(path, output, target_layers=2, keep=0.3, method="grasp", overwrite=True, **data)


STAGES = [
    "layer_surgery.runs.evaluator.window_losses",
    "layer_surgery.calibration.couplings.Responses.add",
    "layer_surgery.surgeon.grasp.attributed_groups",
    "layer_surgery.runs.bench.result_checkpoint",
    "layer_surgery.runs.output.save_checkpoint",
    "layer_surgery.checkpoint.save.StreamedSafetensors.write",
    "layer_surgery.checkpoint.save._copy_companions",
    "layer_surgery.runs.output.check_saved",
    "layer_surgery.runs.output.report_dict",
]


@pytest.fixture
def around_output(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Yield a model, a text, and an output that exists; at the end the output's folder must be as it was."""
    path, text = saved_model(tmp_path / "model"), text_file(tmp_path / "text.txt")
    output = remove(path, tmp_path / "folder" / "output")
    before = listing(tmp_path)
    yield path, text, output
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_in_any_stage_leaves_the_old_output_as_it_was(
    around_output: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("in the middle")

    monkeypatch.setattr(stage, fail)
    path, text, output = around_output
    with pytest.raises(error, match="in the middle"):
        compress_over(path, output, text)


def test_without_a_failure_the_old_output_is_replaced(tmp_path: Path) -> None:
    path, text = saved_model(tmp_path / "model"), text_file(tmp_path / "text.txt")
    output = remove(path, tmp_path / "folder" / "output")
    compress_over(path, output, text)
    assert layer_surgery.load(output).config.low_rank
    assert [entry.name for entry in output.parent.iterdir()] == ["output"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    around_output: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    path, text, output = around_output
    with pytest.raises(LayerSurgeryError, match=r"takes [\d,]+ bytes, but .* has 1,000 free") as caught:
        compress_over(path, output, text)
    assert caught.value.exit_code == 1


def test_what_was_written_must_be_what_was_to_be_written(tmp_path: Path) -> None:
    base = open_checkpoint(saved_model(tmp_path / "model"))
    output = remove(tmp_path / "model", tmp_path / "output")
    check_saved(output, open_checkpoint(output))
    with pytest.raises(CheckpointError, match="is not what was to be written; this is a bug"):
        check_saved(output, base)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    [
        "layer_surgery.checkpoint.save.StreamedSafetensors.write",
        "layer_surgery.checkpoint.save.write_json",
        "shutil.copyfile",
    ],
)
def test_a_disk_that_fills_up_while_writing_leaves_the_old_output(
    around_output: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(place, full_disk)
    path, text, output = around_output
    with pytest.raises(LayerSurgeryError, match="No space left on device") as caught:
        compress_over(path, output, text)
    assert caught.value.exit_code == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_really_full_is_a_failure(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved_model(tmp_path / "model"))
    output = tmp_path / "output"
    output.mkdir()
    (output / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(LayerSurgeryError, match="No space left on device"), writing(output):
        save_checkpoint(checkpoint, output, base=checkpoint)


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    model = model_with_vocabulary()
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight")[2, 3] = float("nan")
    path = saved_model(tmp_path / "model", model=model)
    with pytest.raises(LayerSurgeryError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight' .* NaN or Inf"):
        remove(path, tmp_path / "output", (0,))
    assert not (tmp_path / "output").exists()
    with pytest.raises(LayerSurgeryError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight' .* NaN or Inf"):
        write_shards(open_checkpoint(path), tmp_path, shard_bytes=1 << 30, progress=no_progress)
