"""The contract of encoders, and of classifiers: a tiny random model of each goes through the tool and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from surgery_helpers import refitted, saved_result, tiny_bench
from tiny_encoders import PROBLEM_TYPES, head_of, labelled_tokens, own_loss, tiny_encoder
from tiny_families import ENCODERS
from tiny_models import (
    decoder_layers,
    full_ranks,
    largest_difference,
    make_test_plan,
    padded_on_the_right,
    settings,
    streamed,
    tiny_checkpoint,
    walked_gradients,
    without_layers,
)
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import layer_surgery
from layer_surgery.calibration.couplings import LEVELS
from layer_surgery.calibration.statistics import useful_ranks
from layer_surgery.calibration.units import mlp_channels
from layer_surgery.checkpoint.heads import HEADS
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.objective import NO_LABEL, Problem
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, PlanError
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.walk.self_check import check_survivors, check_walk
from layer_surgery.walk.walk import Walk

#: Every encoder with its masked-LM head and with one other, and three decoders as classifiers.
CASES: list[tuple[str, Problem]] = [
    *((name, "masked_token") for name in ENCODERS),
    ("bert", "multi_label"),
    ("roberta", "single_label"),
    ("xlm-roberta", "tags"),
    ("mpnet", "regression"),
    ("distilbert", "single_label"),
    ("electra", "tags"),
    ("deberta-v2", "multi_label"),
    ("modernbert", "single_label"),
    ("llama", "single_label"),
    ("gpt2", "regression"),
    ("qwen3", "tags"),
]


@dataclass
class Case:
    """A tiny random model with a head, its checkpoint, and labelled tokens for it."""

    model_type: str
    problem: Problem
    model: PreTrainedModel
    path: Path

    def __post_init__(self) -> None:
        self.tokens = labelled_tokens(self.problem)
        #: ModernBERT's first layer has no norm before its attention, so no other can take its place.
        self.removed = [1, 3] if self.model_type == "modernbert" else [0, 3]

    def load(self, directory: Path, **options: Any) -> PreTrainedModel:
        """Load with the auto class of transformers; nothing may be missing or too many."""
        auto_class = getattr(transformers, HEADS[head_of(self.problem)].auto_class)
        model, info = auto_class.from_pretrained(directory, dtype="auto", output_loading_info=True, **options)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return what a model gives for tokens (those of padding left out) or sequences."""
        options = {} if self.model_type in ENCODERS else {"use_cache": False}  # one that is cut by hand has none
        logits: Tensor = model(**self.tokens.inputs(slice(0, self.tokens.sequences)), **options).logits
        return logits if self.tokens.objective.of_sequences else logits[self.tokens.valid]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, problem = request.param
    fields = {"pad_token_id": 0} if model_type == "gpt2" else {}
    made = tiny_encoder(model_type, problem, **fields)
    return Case(model_type, problem, made, tiny_checkpoint(tmp_path_factory.mktemp(model_type), made))


def save_operated(plan: SurgeryPlan, case: Case, output: Path) -> Path:
    base = open_checkpoint(case.path)
    return saved_result(plan, base, output, tokens=case.tokens, dtype=base.dtype, ranks_fixed=True)


def test_the_walk_gives_the_models_own_loss_and_gradients(case: Case, tmp_path: Path) -> None:
    model = streamed(case.path, resident_bytes=0)
    check_walk(model)
    assert model.checkpoint.objective.problem == case.problem
    own = own_loss(case.model, case.tokens)
    # Some classes compute the cross-entropy in float32, also in a float64 model.
    tolerance = 1e-9 if case.problem in ("multi_label", "regression") else 1e-6
    with Walk(model, case.tokens, settings(tmp_path)) as walk:
        gradients = walked_gradients(walk)
        losses = walk.losses(walk.boundary(model.layer_count))
    assert abs(losses.mean - own.item()) < tolerance
    parameters = {name: p for name, p in case.model.named_parameters() if name in gradients}
    assert len(parameters) == len(gradients) >= 5 * 5
    theirs = torch.autograd.grad(own, list(parameters.values()), allow_unused=True)
    count = int(case.tokens.loss_mask.sum())
    largest = max(float(g.abs().max()) for g in theirs if g is not None) * count
    for name, gradient in zip(parameters, theirs, strict=True):
        expected = torch.zeros_like(parameters[name]) if gradient is None else gradient * count
        if isinstance(case.model.get_submodule(name.rpartition(".")[0]), Conv1D) and expected.dim() == 2:
            expected = expected.T
        assert float((gradients[name] - expected).abs().max()) < 10 * tolerance * largest, name


def padded(tokens: PackedTokens, more: int) -> PackedTokens:
    """Return the tokens with more padding, and their labels with it."""
    wider = padded_on_the_right(tokens, more)
    if tokens.objective.of_sequences or tokens.labels is None:
        return wider
    none = torch.full((tokens.sequences, more), NO_LABEL)
    return replace(wider, labels=torch.cat([tokens.labels, none], dim=1))


def test_padding_changes_no_loss(case: Case, tmp_path: Path) -> None:
    found = []
    for tokens in (case.tokens, padded(case.tokens, 5)):
        with Walk(streamed(case.path), tokens, settings(tmp_path, batch_size=3)) as walk:
            found.append(walk.losses(walk.forward(range(5), keep=False)).sums)
    assert torch.allclose(*found, rtol=0, atol=1e-6 if case.model_type == "modernbert" else 1e-9)


def test_a_model_without_two_layers_loads_in_stock_transformers_and_is_the_original_without_them(
    case: Case, tmp_path: Path
) -> None:
    plan = make_test_plan(5, removed=case.removed, method="remove")
    output = save_operated(plan, case, tmp_path / "output")
    loaded = case.load(output)
    assert type(loaded) is type(case.model) and len(decoder_layers(loaded)) == 3
    expected = case.logits(without_layers(case.model, case.removed))
    assert largest_difference(case.logits(loaded), expected) < 1e-9
    assert largest_difference(case.logits(loaded), case.logits(case.model)) > 1e-3, "the removed layers did nothing"
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(output).sha256() == open_checkpoint(tmp_path / "again").sha256()


def test_low_rank_and_narrower_layers_survive_saving_and_loading_in_stock_transformers(
    case: Case, tmp_path: Path
) -> None:
    base = open_checkpoint(case.path)
    units = mlp_channels(base.layers[4], base.architecture)
    assert units is not None and units.count == 40
    plan = make_test_plan(5, removed=[1], low_rank={2: dict.fromkeys(full_ranks(base, 2), 3)}, method="mix")
    layers = [*plan.layers[:4], LayerPlan(index=4, action="reduce", channels=12)]
    output = save_operated(replace(plan, layers=layers), case, tmp_path / "output")
    loaded = case.load(output, trust_remote_code=True)
    assert sum(p.numel() for p in loaded.parameters()) == open_checkpoint(output).parameters < base.parameters
    assert type(loaded).__name__ == HEADS[head_of(case.problem)].entry
    mine = layer_surgery.load(output).eval()
    assert largest_difference(case.logits(mine), case.logits(loaded)) == 0
    check_walk(streamed(output))
    # Multiplied out and filled up with zeros, it is a plain checkpoint that computes the same.
    dense = tmp_path / "dense"
    layer_surgery.export_dense(output, dense)
    plain = case.load(dense)
    assert type(plain) is type(case.model)
    assert largest_difference(case.logits(plain), case.logits(loaded)) < 1e-9
    assert largest_difference(case.logits(plain), case.logits(case.model)) > 1e-3
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").sha256() == open_checkpoint(output).sha256()


def test_the_body_of_a_result_is_an_encoder_for_other_tools(tmp_path: Path) -> None:
    """`AutoModel`, as for the pipeline `feature-extraction`, and a new head on a masked language model."""
    case = Case("bert", "masked_token", made := tiny_encoder("bert", "masked_token"), tiny_checkpoint(tmp_path, made))
    low_rank = {1: dict.fromkeys(full_ranks(open_checkpoint(case.path), 1), 3)}
    output = save_operated(make_test_plan(5, low_rank=low_rank), case, tmp_path / "output")
    inputs = case.tokens.inputs(slice(0, 5))
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": True}
    whole = case.load(output, trust_remote_code=True)
    body = transformers.AutoModel.from_pretrained(output, **options).eval()
    with torch.no_grad():
        states = body(**inputs).last_hidden_state
        assert largest_difference(states, whole.bert(**inputs).last_hidden_state) == 0
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(output, num_labels=4, **options)
    assert classifier.classifier.out_features == 4
    assert torch.equal(classifier.bert.encoder.layer[1].output.dense.in_factor.weight, factor_of(body))


def factor_of(body: nn.Module) -> Tensor:
    return body.get_parameter("encoder.layer.1.output.dense.in_factor.weight")


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_refit_follows_the_original_with_norms_before_and_after_the_sum(model_type: str, tmp_path: Path) -> None:
    """After the sum (BERT) nothing is added plainly to the stream, so linears follow their own outputs."""
    tokens = labelled_tokens("single_label", 40, 12)
    model = tiny_encoder(model_type, "single_label")
    ranks = {name: min(6, most) for name, most in full_ranks(open_checkpoint(model), 1).items()}
    plan = make_test_plan(5, removed=[2], low_rank={1: ranks})
    result = refitted(model, plan, tmp_path, tokens=tokens)
    assert any(record.ridge is not None for record in result.records)
    assert all(record.error_after <= record.error_before for record in result.records)
    before, after = result.stream_errors(tmp_path, tokens)
    assert after < 0.95 * before


def test_couplings_of_a_classifier_are_those_of_whole_sequences(tmp_path: Path) -> None:
    """One loss a sequence moves with all of its tokens, so what they do to it is added before it is squared."""
    model, tokens = tiny_encoder("bert", "single_label"), labelled_tokens("single_label", 6, 12)
    with tiny_bench(open_checkpoint(model), tmp_path, tokens=tokens) as bench:
        couplings = bench.statistics.get(bench.walk, useful_ranks(bench.model, range(5))).couplings
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: states.append(out)) for layer in decoder_layers(model)]
    total = own_loss(model, tokens) * tokens.sequences
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(total, states)
    moved = [
        ((states[k - 1] - states[k]) * gradients[k] * tokens.valid[..., None]).sum(dim=(1, 2)).detach() for k in (1, 3)
    ]
    found = couplings.between(LEVELS[0])
    expected = {(i, j): float((moved[i] * moved[j]).mean()) for i in (0, 1) for j in (0, 1)}
    layers = (1, 3)
    for (i, j), value in expected.items():
        assert found[layers[i], layers[j]] == pytest.approx(value, rel=1e-6)


def test_the_first_layer_of_modernbert_is_not_removed_for_it_has_no_norm(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_checkpoint(tmp_path, tiny_encoder("modernbert", "masked_token")))
    with tiny_bench(base, tmp_path / "scratch", tokens=labelled_tokens("masked_token")) as bench:
        with pytest.raises(PlanError, match=r"layer 1 of .* would not stay what it is .* another 'attn_norm'"):
            bench.operate(make_test_plan(5, removed=[0], method="remove"), "remove")
        survivors = bench.operate(make_test_plan(5, removed=[1], method="remove"), "remove").checkpoint
        check_survivors(bench.model, streamed(survivors), [0, 2, 3, 4])


def test_layers_with_something_between_them_are_refused(tmp_path: Path) -> None:
    """The convolution of large DeBERTas stands behind the first layer, where no walk would see it."""
    model = tiny_encoder("deberta-v2", "masked_token", conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(CheckpointError, match=r"does not give what the model itself gives|cannot be run"):
        check_walk(streamed(model))


def test_what_other_heads_look_at_is_left_out_of_a_masked_language_model(tmp_path: Path) -> None:
    """As published BERTs have a pooler and a head for the next sentence."""
    made = tiny_encoder("bert", "masked_token")
    pretrained = transformers.BertForPreTraining(made.config).to(torch.float64)
    pretrained.config.architectures = ["BertForMaskedLM"]
    path = tmp_path / "model"
    pretrained.save_pretrained(path)
    config = path / "config.json"
    config.write_text(config.read_text().replace("BertForPreTraining", "BertForMaskedLM"))
    left_out = open_checkpoint(path).left_out
    assert sorted(left_out) == [
        *(f"bert.pooler.dense.{part}" for part in ("bias", "weight")),
        *(f"cls.seq_relationship.{part}" for part in ("bias", "weight")),
    ]


def test_an_encoder_without_a_head_is_refused() -> None:
    model = BertModel(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(CheckpointError, match="no other head that there is a loss for"):
        open_checkpoint(model)


def test_a_model_in_memory_has_the_head_of_its_class_whatever_it_was_loaded_from(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tiny_encoder("bert", "masked_token"))
    classifier = transformers.BertForSequenceClassification.from_pretrained(path, num_labels=3, dtype="auto").eval()
    assert classifier.config.architectures == ["BertForMaskedLM"]
    case = Case("bert", "single_label", classifier, path)
    plan = make_test_plan(5, removed=[2], method="remove")
    output = tmp_path / "output"
    saved_result(plan, open_checkpoint(classifier), output, tokens=case.tokens, dtype=torch.float64)
    expected = case.logits(without_layers(classifier, [2]))
    assert largest_difference(case.logits(case.load(output)), expected) < 1e-9


def test_encoder_decoders_are_refused_whatever_their_head() -> None:
    config = transformers.BartConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    with pytest.raises(CheckpointError, match="but an encoder-decoder"):
        open_checkpoint(transformers.BartForSequenceClassification(config))


@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
def test_positions_behind_that_of_padding_make_the_longest_sequence_shorter(model_type: str) -> None:
    model = tiny_encoder(model_type, "masked_token", max_position_embeddings=20, pad_token_id=1)
    checkpoint = open_checkpoint(model)
    assert checkpoint.longest_sequence == 18
    ids = torch.randint(3, 61, (1, 19))
    model(ids[:, :18])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_what_a_classifier_is_for_is_what_its_configuration_says(problem: Problem) -> None:
    objective = open_checkpoint(tiny_encoder("bert", problem)).objective
    assert (objective.problem, len(objective.labels), objective.padding_id) == (problem, 3, 0)
    unsaid = open_checkpoint(tiny_encoder("bert", problem, problem_type=None, num_labels=1)).objective
    assert unsaid.problem == "regression"
