"""Speed by a clock that the test winds; peak memory against what is known to be there; continuations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import model_with_vocabulary, saved_model
from tiny_models import packed_tokens, streamed, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from layer_surgery import devices
from layer_surgery.config import ContinuationConfig, SpeedConfig
from layer_surgery.errors import UserError
from layer_surgery.evaluation import speed as module
from layer_surgery.evaluation.continuations import continuations, encode_prompt, prompts_from
from layer_surgery.evaluation.speed import Allocations, generation_memory_bytes, measure_speed
from layer_surgery.progress import no_progress


def test_times_are_those_of_torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ticks = set[str](), itertools.count()

    def look(_device: torch.device) -> float:
        seen.add(torch.get_float32_matmul_precision())
        return float(next(ticks))

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(module, "now", look)
    monkeypatch.setattr(devices, "float32_by_onednn", lambda: True)
    config = SpeedConfig(speed=True, speed_lengths=(4,), speed_new_tokens=2, speed_repeats=1)
    with devices.fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() != before
        measure_speed([tiny_model()], config, no_progress, seed=0)
    assert seen == {before}


def test_numbers_follow_from_the_times_of_prefill_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock is 2 s after the one before, so a prefill and every step take 2 s."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(module, "now", lambda _device: float(next(ticks)))
    sizes: dict[str, Any] = {"speed_batch_sizes": (1, 3), "speed_lengths": (4, 8), "speed_new_tokens": 5}
    config = SpeedConfig(speed=True, speed_repeats=3, **sizes)
    (points,) = measure_speed([tiny_model()], config, no_progress, seed=0)
    assert [(p.batch_size, p.prompt_tokens) for p in points] == [(1, 4), (1, 8), (3, 4), (3, 8)]
    for point in points:
        assert point.prefill_tokens_per_second == point.batch_size * point.prompt_tokens / 2
        assert point.decode_tokens_per_second == point.batch_size * 4 / 8
        assert point.time_to_first_token_seconds == point.latency_p50_seconds == point.latency_p95_seconds == 2
        assert (point.new_tokens, point.repeats) == (5, 3)


def test_percentiles_are_over_all_steps_and_medians_over_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Run 0 warms up. Prefill, then two steps, in seconds:
    runs = [(100, 100, 100), (1, 1, 2), (3, 3, 40), (5, 5, 6)]
    times: list[float] = []
    for run in [*runs, (7, 7)]:  # the last is that of the memory
        times += list(itertools.accumulate((0, *run)))
    stream = iter(times)
    monkeypatch.setattr(module, "now", lambda _device: float(next(stream)))
    config = SpeedConfig(speed=True, speed_lengths=(6,), speed_new_tokens=3, speed_repeats=3)
    ((point,),) = measure_speed([tiny_model()], config, no_progress, seed=0)
    assert point.time_to_first_token_seconds == 3
    assert point.prefill_tokens_per_second == 2
    assert point.decode_tokens_per_second == pytest.approx(2 / 11)
    assert point.latency_p50_seconds == 4  # of 1 2 3 5 6 40
    assert 30 < point.latency_p95_seconds < 40


def test_models_take_turns_and_each_goes_first_in_half_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = tiny_model(), tiny_model(layers=3)
    order: list[int] = []
    run = module._run

    def spy(model: Any, *arguments: Any) -> None:
        order.append(len(model.model.layers))
        run(model, *arguments)

    monkeypatch.setattr(module, "_run", spy)
    measure_speed([before, after], SpeedConfig(speed=True, speed_lengths=(4,), speed_repeats=3), no_progress, seed=0)
    assert order == [4, 3, 3, 4, 4, 3, 3, 4, 4, 3]


def test_what_is_timed_is_greedy_generation_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    forward = model.forward

    def spy(**kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"])
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", spy)
    prompt = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module._run(model, prompt, 6, module._Timings())
    monkeypatch.undo()
    expected = model.generate(prompt, do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=None)
    assert torch.equal(torch.cat(seen, dim=1), expected[:, :-1])
    assert [ids.shape[1] for ids in seen] == [7, 1, 1, 1, 1, 1]


def test_peak_memory_is_the_weights_and_what_generation_takes(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        small, large = (generation_memory_bytes(model, torch.ones(batch, 40, dtype=torch.int64)) for batch in (1, 8))
    # Keys and values of 4 layers, 2 heads, head_dim 12, for 40 tokens, and the widest activations: gate and up.
    cache, activations = 4 * 2 * 2 * 12 * 4 * 40, 2 * 40 * 4 * 40
    assert weights + cache + activations < small < weights + 3 * (cache + activations)
    assert 6.5 * (small - weights) < large - weights < 8.5 * (small - weights)
    half = streamed(model, dtype=torch.bfloat16).load_whole()
    with torch.no_grad():
        assert generation_memory_bytes(half, torch.ones(1, 40, dtype=torch.int64)) < 0.7 * small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed_batch_sizes": (0,)}, "--speed-batch-sizes is 0; allowed: 1 or more"),
        ({"speed_batch_sizes": ()}, "--speed-batch-sizes is empty"),
        ({"speed_lengths": (8, -1)}, "--speed-lengths is -1"),
        ({"speed_new_tokens": 1}, "--speed-new-tokens is 1; allowed: 2 or more"),
        ({"speed_repeats": 0}, "--speed-repeats is 0"),
    ],
)
def test_settings_of_speed_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpeedConfig(**options)


# Allocations

MEGABYTE = 1 << 20


def block(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8)


def test_the_peak_is_the_most_at_a_time_and_not_the_sum() -> None:
    with Allocations() as allocations:
        a = block(3)
        b = block(2)
        del a
        c = block(4)
        del b, c
        block(5)
    assert allocations.peak_bytes == 6 * MEGABYTE


def test_views_and_in_place_operations_take_nothing() -> None:
    with Allocations() as allocations:
        a = block(3)
        a.view(3, -1)[1:].add_(1)
    assert allocations.peak_bytes == 3 * MEGABYTE


def test_what_was_there_before_does_not_count() -> None:
    before = block(7)
    with Allocations() as allocations:
        view = before[: 2 * MEGABYTE]
        copy = view.clone()
        del before, view
    assert allocations.peak_bytes == copy.nbytes == 2 * MEGABYTE


def test_a_freed_address_that_is_used_again_counts_again() -> None:
    with Allocations() as allocations:
        for _ in range(5):
            block(2)
        held = [block(2) for _ in range(3)]
    assert allocations.peak_bytes == sum(tensor.nbytes for tensor in held)


# Continuations


def test_a_continuation_is_what_transformers_generate(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in ("the quick brown", "one two")]
    whole = streamed(path, dtype=torch.float32).load_whole()
    written = continuations(whole, tokenizer, prompts, 9, no_progress)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for prompt, text in zip(prompts, written, strict=True):
        ids = loaded.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=9, pad_token_id=0)
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    assert len(set(written)) == 2


@pytest.mark.parametrize(("model_type", "field"), [("llama", "max_position_embeddings"), ("mpt", "max_seq_len")])
def test_a_continuation_stops_where_the_model_ends(model_type: str, field: str) -> None:
    model = tiny_model(model_type, vocab_size=320, **{field: 16})
    prompt = list(range(5, 19))
    (text,) = continuations(model, tiny_tokenizer(), [prompt], 9, no_progress)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=2, pad_token_id=0)
    assert text == tiny_tokenizer().decode(ids[0, 14:], skip_special_tokens=True)


def test_prompts_are_spread_over_the_text_and_have_no_padding() -> None:
    tokens = packed_tokens(10, 12)
    prompts = prompts_from(tokens, 3, 5)
    assert prompts == [tokens.token_ids[row, :5].tolist() for row in (0, 3, 6)]
    padded = packed_tokens(6, 12, padding=True)
    for prompt in prompts_from(padded, 6, 9):
        assert len(prompt) == 9 and 0 not in prompt
    assert len(prompts_from(packed_tokens(2, 12), 5, 20)) == 2


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_prompt_begins_as_a_text_and_does_not_end(adds_eos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True, adds_eos=adds_eos)
    ids = encode_prompt(tokenizer, "the fox")
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:]) == "the fox"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continuations": -1}, "--continuations is -1"),
        ({"continuations": 2, "prompts": ("x",)}, "use one of the two"),
        ({"prompts": (" ",)}, "--prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ContinuationConfig(**options)


def test_a_whole_model_from_a_stream_is_the_model(tmp_path: Path) -> None:
    model = model_with_vocabulary(tied=True)
    path = saved_model(tmp_path / "model", model=model)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    for resident in (0, 1 << 29):
        whole = streamed(path, dtype=torch.float32, resident_bytes=resident).load_whole()
        with torch.no_grad():
            assert torch.equal(whole(ids).logits, model(ids).logits)
        assert not any(parameter.is_meta for parameter in whole.parameters())
