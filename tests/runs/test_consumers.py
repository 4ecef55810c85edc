"""What other tools do with saved directories: the checks of consumer_checks.py, on tiny models and the demo checkpoint.

experiments/consumers/table.py runs all of them on all kinds of results; test_tasks.py has lm-eval's command line too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from consumer_checks import CHECKS, Subject, make_subjects, static_cache
from tiny_checkpoints import DEMO, saved_model
from tiny_models import make_test_plan

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint

KINDS = ("plain", "low_rank", "no_attention", "narrowed", "dense")
#: Seconds each, and of no interest for plain results, which are of the same classes as the original.
LONG = ("compile", "export", "lm_eval", "tensor_parallel")
OWN_CLASSES = ("low_rank", "no_attention", "narrowed")


def cases(*, slow: bool) -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name, check in CHECKS.items()
        if check.slow is slow
        for kind in KINDS
        if (kind == "low_rank" or not check.factors_only) and (name not in LONG or kind in OWN_CLASSES)
    ]


@pytest.fixture(scope="module", autouse=True)
def _own_place_for_remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        modules = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories made of a tiny model with biases, one of whose operated layers is the first."""
    directory = tmp_path_factory.mktemp("tiny")
    original = saved_model(directory / "original", "qwen2", layers=4, use_sliding_window=False, tied=True)
    return make_subjects(original, directory, first=0, second=2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_subjects(DEMO, tmp_path_factory.mktemp("demo"), first=0, second=7)


def run_check(name: str, directory: Path, scratch: Path) -> None:
    if name == "torchao":
        pytest.importorskip("torchao")
    CHECKS[name].function(Subject(directory, scratch))


@pytest.mark.parametrize(("name", "kind"), cases(slow=False))
def test_a_tiny_result_works_in(name: str, kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    run_check(name, tiny[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), cases(slow=True))
def test_a_tiny_result_works_in_a_process_of(name: str, kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    run_check(name, tiny[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [case for case in cases(slow=False) if case[0] not in LONG])
def test_a_result_of_the_demo_checkpoint_works_in(name: str, kind: str, demo: dict[str, Path], tmp_path: Path) -> None:
    run_check(name, demo[kind], tmp_path)


# The cache of a removed attention


def without_attention(path: Path, output: Path, layers: list[int]) -> Path:
    checkpoint = open_checkpoint(path)
    linears = checkpoint.architecture.linears_of("attention")
    low_rank = {
        index: {
            name: 0 for name in linears if f"{checkpoint.layer_prefix(index)}{name}.weight" in checkpoint.source.specs
        }
        for index in layers
    }
    plan = make_test_plan(checkpoint.layer_count, low_rank=low_rank)
    layer_surgery.compress(path, output, plan=plan, eval_data=None, refit=False)
    return output


@pytest.mark.parametrize("layers", [[0], [2], [4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gemma3_text", "phi3"])
def test_tokens_with_a_cache_are_those_without_where_attention_is_removed(
    model_type: str, layers: list[int], tmp_path: Path
) -> None:
    path = saved_model(tmp_path / "model", model_type, layers=5)
    directory = without_attention(path, tmp_path / "output", layers)
    for name in ("dynamic_cache", "static_cache", "left_padding"):
        CHECKS[name].function(Subject(directory, tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_a_removed_attention_keeps_two_numbers_a_token(model_type: str, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", model_type, layers=3)
    model = layer_surgery.load(without_attention(path, tmp_path / "output", [0, 2]))
    ids = Subject(path, tmp_path).token_ids[:, :4]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    sizes = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert sizes[0] == sizes[2] == 2 * ids.numel()
    assert sizes[1] > 10 * sizes[0]
    assert cache.get_seq_length() == ids.shape[1]


def test_an_attention_with_components_left_keeps_its_cache(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model", layers=3)
    checkpoint = open_checkpoint(path)
    ranks = dict.fromkeys(checkpoint.architecture.linears_of("attention"), 0) | {"self_attn.o_proj": 1}
    plan = make_test_plan(3, low_rank={1: ranks})
    layer_surgery.compress(path, tmp_path / "output", plan=plan, eval_data=None, refit=False)
    model = layer_surgery.load(tmp_path / "output")
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    assert len({layer.keys.shape for layer in cache.layers}) == 1


def test_a_static_cache_that_was_made_beforehand_works_where_attention_is_removed(tmp_path: Path) -> None:
    from transformers import StaticCache

    path = saved_model(tmp_path / "model", layers=3)
    subject = Subject(without_attention(path, tmp_path / "output", [0]), tmp_path)
    model, ids = subject.load(), subject.token_ids
    cache = StaticCache(config=model.config, max_cache_len=32)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    cache.early_initialization(batch_size=2, num_heads=heads, head_dim=width, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache, use_cache=True)
        found = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits
        expected = model(ids, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(found, expected)
    static_cache(subject)
