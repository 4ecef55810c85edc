"""Losses against identities: limits, bounds, decompositions, and nothing to learn from oneself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from layer_surgery.errors import UserError
from layer_surgery.healing.losses import (
    LOSSES,
    AttentionPair,
    LossEntry,
    RelationPair,
    StatePair,
    Stones,
    TeacherLogits,
    TokenLogits,
)
from layer_surgery.healing.losses.attention import relation_kl
from layer_surgery.healing.losses.cross_entropy import cross_entropy
from layer_surgery.healing.losses.decoupled import decouple
from layer_surgery.healing.losses.divergences import forward_kl, generalised_jsd, reverse_kl, skew_kl, total_variation
from layer_surgery.healing.losses.inputs import VectorPair
from layer_surgery.healing.losses.states import Projections, hidden_mse, normalised_mse
from layer_surgery.healing.losses.vectors import VectorProjection

N, V, D = 6, 11, 5
LABELS = torch.tensor([0, 3, 10, 3, 7, 1])
LOGITS_LOSSES = [entry for entry in LOSSES if entry.needs == "logits"]
TOP_K_LOSSES = [entry for entry in LOGITS_LOSSES if "top_k" in entry.teachers]


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER, STUDENT = random(N, V, seed=1), random(N, V, seed=2)


def dense(logits: Tensor = TEACHER, temperature: float = 1.0) -> TeacherLogits:
    return TeacherLogits((logits / temperature).log_softmax(dim=1), temperature=temperature)


def top_k(k: int, logits: Tensor = TEACHER, *, padding: int = 0, temperature: float = 1.0) -> TeacherLogits:
    """Return the k largest with the mass of the rest, by its definition; rows filled up with padding."""
    log_probs = (logits / temperature).log_softmax(dim=1)
    kept, ids = log_probs.topk(k, dim=1)
    tail = (1 - kept.exp().sum(dim=1)).clamp_min(0).log() if k < logits.shape[1] else torch.full((N,), -torch.inf)
    kept = torch.cat([kept, torch.full((N, padding), -torch.inf, dtype=kept.dtype)], dim=1)
    ids = torch.cat([ids, torch.full((N, padding), -1)], dim=1)
    return TeacherLogits(kept, ids, tail, temperature=temperature)


def tokens(student: Tensor = STUDENT, teacher: TeacherLogits | None = None) -> TokenLogits:
    return TokenLogits(student, teacher or dense(), LABELS)


def kl(left: Tensor, right: Tensor) -> Tensor:
    p, q = left.softmax(dim=1), right.softmax(dim=1)
    return (p * (p / q).log()).sum(dim=1)


def by_name(entries: list[LossEntry]) -> Any:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


# -- values by definition


def test_divergences_are_what_they_are_defined_to_be() -> None:
    p, q = TEACHER.softmax(dim=1), STUDENT.softmax(dim=1)
    torch.testing.assert_close(forward_kl(tokens()), kl(TEACHER, STUDENT))
    torch.testing.assert_close(reverse_kl(tokens()), kl(STUDENT, TEACHER))
    torch.testing.assert_close(skew_kl(tokens(), skew=0.3), (p * (p / (0.3 * p + 0.7 * q)).log()).sum(dim=1))
    torch.testing.assert_close(total_variation(tokens()), (p - q).abs().sum(dim=1) / 2)
    m = 0.25 * p + 0.75 * q
    expected = 0.25 * (p * (p / m).log()).sum(dim=1) + 0.75 * (q * (q / m).log()).sum(dim=1)
    torch.testing.assert_close(generalised_jsd(tokens(), beta=0.25), expected)


def test_cross_entropy_with_smoothing_is_that_of_a_smoothed_label() -> None:
    target = torch.nn.functional.one_hot(LABELS, V) * 0.8 + 0.2 / V
    expected = -(target * STUDENT.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(cross_entropy(TokenLogits(STUDENT, None, LABELS), smoothing=0.2), expected)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_temperature_divides_logits_and_multiplies_by_its_square(temperature: float) -> None:
    expected = temperature**2 * kl(TEACHER / temperature, STUDENT / temperature)
    for teacher in (dense(), dense(temperature=temperature), top_k(V, temperature=temperature)):
        torch.testing.assert_close(forward_kl(tokens(teacher=teacher), temperature=temperature), expected)


def test_the_gradient_keeps_its_size_at_any_temperature() -> None:
    def size(loss: Callable[..., Tensor], temperature: float) -> float:
        student = STUDENT.clone().requires_grad_()
        loss(tokens(student), temperature=temperature).sum().backward()
        assert student.grad is not None
        return float(student.grad.norm())

    for loss in (forward_kl, reverse_kl, skew_kl, generalised_jsd, total_variation):
        assert size(loss, 1e4) == pytest.approx(size(loss, 1e3), rel=0.02)


def test_jsd_goes_to_each_kl() -> None:
    edge = 1e-6
    torch.testing.assert_close(generalised_jsd(tokens(), beta=edge) / edge, kl(TEACHER, STUDENT), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        generalised_jsd(tokens(), beta=1 - edge) / edge, kl(STUDENT, TEACHER), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(skew_kl(tokens(), skew=0.0), kl(TEACHER, STUDENT))


def test_jsd_of_halves_is_symmetric_and_at_most_log_2() -> None:
    mirrored = generalised_jsd(TokenLogits(TEACHER, dense(STUDENT), LABELS))
    torch.testing.assert_close(generalised_jsd(tokens()), mirrored)
    apart = torch.full((1, 4), -200.0, dtype=torch.float64)
    one, other = apart.clone(), apart.clone()
    one[0, 0], other[0, 1] = 200.0, 200.0
    value = generalised_jsd(TokenLogits(one, dense(other), torch.tensor([0])))
    torch.testing.assert_close(value, torch.full_like(value, 2.0).log())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_parts_recombine_to_kl(temperature: float) -> None:
    parts = decouple(tokens(), temperature)
    whole = parts.target + (1 - parts.label_probability) * parts.others
    torch.testing.assert_close(whole, kl(TEACHER / temperature, STUDENT / temperature))


def test_class_aware_terms_are_those_of_the_full_matrices() -> None:
    s, t = (x - x.mean(dim=1, keepdim=True) for x in (STUDENT, TEACHER))
    value = LOSSES["clkd"].function(tokens(), classes=3.0, correlation=0.7).mean()
    rows = (s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(dim=1).mean()
    columns = (s / s.norm(dim=0) - t / t.norm(dim=0)).square().sum(dim=0).mean()
    correlations = (torch.corrcoef(s.T) - torch.corrcoef(t.T)).square().mean()
    torch.testing.assert_close(value, rows + 3 * columns + 0.7 * correlations)


def test_stones_count_half_as_much_as_the_next() -> None:
    stones = Stones((random(N, V, seed=5), random(N, V, seed=6), STUDENT), dense())
    first, second, last = (kl(TEACHER, logits) for logits in stones.students)
    torch.testing.assert_close(LOSSES["stones"].function(stones), first / 4 + second / 2 + last)


# -- sparse teachers


@by_name(TOP_K_LOSSES)
def test_with_all_tokens_kept_a_sparse_teacher_is_a_dense_one(entry: LossEntry) -> None:
    torch.testing.assert_close(
        entry.function(tokens(teacher=top_k(V, padding=2))), entry.function(tokens(teacher=dense()))
    )


@by_name(TOP_K_LOSSES)
def test_merging_outcomes_never_raises_a_divergence(entry: LossEntry) -> None:
    whole, last = entry.function(tokens()), torch.zeros(N, dtype=torch.float64)
    for k in range(1, V):
        merged = entry.function(tokens(teacher=top_k(k)))
        assert (merged <= whole + 1e-12).all() and (merged >= last - 1e-12).all()
        last = merged
    assert (entry.function(tokens(teacher=top_k(1))) < whole - 1e-3).any()


@by_name(TOP_K_LOSSES)
def test_padding_counts_nothing(entry: LossEntry) -> None:
    plain, padded = (STUDENT.clone().requires_grad_() for _ in range(2))
    one = entry.function(tokens(plain, top_k(3)))
    other = entry.function(tokens(padded, top_k(3, padding=4)))
    torch.testing.assert_close(one, other)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(plain.grad, padded.grad)


def test_a_tail_far_below_rounding_is_summed_up_and_not_subtracted() -> None:
    student = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)  # outside of token 0: 2 exp(-40)
    log_probs = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    teacher = TeacherLogits(log_probs[:, :1], torch.tensor([[0]]), log_probs[:, 1])
    expected = -torch.log(torch.tensor(2.0)).double() - 0.5 * (torch.log(torch.tensor(2.0)).double() - 40)
    torch.testing.assert_close(forward_kl(TokenLogits(student, teacher, torch.tensor([0]))), expected[None])


def test_a_sample_gives_the_gradient_of_kl_on_average() -> None:
    student = STUDENT.clone().requires_grad_()
    drawn = torch.multinomial(TEACHER.softmax(dim=1), 40_000, True, generator=torch.Generator().manual_seed(3))
    counts = torch.stack([torch.bincount(row, minlength=V) for row in drawn]).double()
    ids = torch.arange(V).repeat(N, 1).masked_fill(counts == 0, -1)
    forward_kl(tokens(student, TeacherLogits((counts / counts.sum(dim=1, keepdim=True)).log(), ids))).sum().backward()
    torch.testing.assert_close(student.grad, STUDENT.softmax(dim=1) - TEACHER.softmax(dim=1), rtol=0, atol=0.02)


@by_name(LOGITS_LOSSES)
def test_a_teacher_that_a_loss_is_not_defined_for_is_refused_by_name(entry: LossEntry) -> None:
    refused = {"dense", "top_k", "sampled"} - set(entry.teachers)
    assert "dense" in entry.teachers
    for kind in refused:
        with pytest.raises(UserError, match=f"'{entry.name}' .* kept; .* another loss .*kl"):
            entry.check_teacher(kind)  # type: ignore[arg-type]
    if "top_k" in refused:
        with pytest.raises(ValueError, match="whole distribution"):
            entry.function(tokens(teacher=top_k(3)))


def test_a_sparse_teacher_of_another_temperature_is_refused() -> None:
    with pytest.raises(UserError, match="kept at temperature 2, and the loss has temperature 1;"):
        forward_kl(tokens(teacher=top_k(3, temperature=2.0)))


# -- nothing to learn from oneself, and gradients


def of_itself(entry: LossEntry, x: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Return a loss of student tensors and the teacher's, whatever the loss needs."""
    causal = torch.ones(4, 4, dtype=torch.bool).tril().repeat(2, 1, 1)
    causal[1, 2:] = causal[1, :, 2:] = False  # padding
    if entry.needs == "logits":
        return entry.function(TokenLogits(x["logits"], dense(teacher["logits"]), LABELS)).sum()
    if entry.needs == "stones":
        return entry.function(Stones((x["logits"], x["logits"] * 1), dense(teacher["logits"]))).sum()
    if entry.needs == "states":
        return entry.function([StatePair(x["states"][i], teacher["states"][i], i) for i in range(3)])
    if entry.needs == "attention":
        return entry.function([AttentionPair(x["scores"], teacher["scores"], causal)])
    assert entry.needs == "relations"
    return entry.function([RelationPair(x["values"], teacher["values"], causal)])


def models(seed: int) -> dict[str, Tensor]:
    return {
        "logits": random(N, V, seed=seed),
        "states": random(3, N, D, seed=seed + 1),
        "scores": random(2, 3, 4, 4, seed=seed + 2),
        "values": random(2, 4, 8, seed=seed + 3, scale=1.0),
    }


#: But for those between embeddings: tests/healing/test_embedders.py.
DISTILLATION = [entry for entry in LOSSES if entry.needs not in ("labels", "vectors")]


@by_name(DISTILLATION)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(entry: LossEntry) -> None:
    teacher = models(10)
    student = {name: tensor.clone().requires_grad_() for name, tensor in teacher.items()}
    value = of_itself(entry, student, teacher)
    assert abs(float(value.detach())) < 1e-12
    value.backward()
    gradients = [tensor.grad for tensor in student.values() if tensor.grad is not None]
    assert gradients and all(float(gradient.abs().max()) < 1e-12 for gradient in gradients)
    assert float(of_itself(entry, models(50), teacher)) > 1e-3


@by_name(DISTILLATION)
def test_gradients_are_those_of_the_value(entry: LossEntry) -> None:
    teacher, student = models(10), models(50)
    name = {"logits": "logits", "stones": "logits", "states": "states", "attention": "scores"}.get(
        entry.needs, "values"
    )
    free = student[name].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: of_itself(entry, student | {name: x}, teacher), (free,))


@by_name(TOP_K_LOSSES)
@pytest.mark.parametrize("k", [1, 4, V])
def test_gradients_with_sparse_teachers_are_those_of_the_value(entry: LossEntry, k: int) -> None:
    teacher, student = top_k(k, padding=1), STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entry.function(tokens(x, teacher)), (student,))


@by_name([*LOGITS_LOSSES, LOSSES["ce"]])
def test_values_are_per_token_and_finite_where_probabilities_vanish(entry: LossEntry) -> None:
    sharp = torch.full((2, 4), -300.0)
    sharp[0, 1] = sharp[1, 3] = 300.0
    student = sharp.flip(0).clone().requires_grad_()
    value = entry.function(TokenLogits(student, TeacherLogits(sharp.log_softmax(dim=1)), torch.tensor([1, 3])))
    value.sum().backward()
    assert value.shape == (2,) and torch.isfinite(value).all()
    assert student.grad is not None and torch.isfinite(student.grad).all()


# -- states and attention


def test_hidden_losses_by_definition() -> None:
    pairs = [StatePair(random(N, D, seed=i), random(N, D, seed=i + 10), i) for i in range(2)]
    squares = [(pair.student - pair.teacher).square().mean() for pair in pairs]
    torch.testing.assert_close(hidden_mse(pairs), (squares[0] + squares[1]) / 2)
    silent = [StatePair(torch.zeros_like(pair.teacher), pair.teacher, pair.position) for pair in pairs]
    assert float(normalised_mse(silent)) == pytest.approx(1.0)


def test_the_trajectory_has_directions_and_steps() -> None:
    pairs = [StatePair(random(N, D, seed=i), random(N, D, seed=i + 10), i) for i in range(3)]
    loss = LOSSES["trajectory"].function
    steps = [
        1 - torch.cosine_similarity(b.student - a.student, b.teacher - a.teacher).mean() for a, b in pairwise(pairs)
    ]
    torch.testing.assert_close(loss(pairs, direction=0.0, step=2.0), steps[0] + steps[1])
    torch.testing.assert_close(loss(pairs, direction=1.0, step=0.0), LOSSES["cosine"].function(pairs))
    # A stream that is moved by the same vector everywhere keeps its steps.
    moved = [StatePair(pair.teacher + 3, pair.teacher, pair.position) for pair in pairs]
    assert abs(float(loss(moved, direction=0.0))) < 1e-12 < float(loss(moved, step=0.0))
    with pytest.raises(ValueError, match="in the order of the layers"):
        loss(pairs[::-1])


def test_cka_is_blind_to_rotation_and_scale_and_sees_a_new_shape() -> None:
    states = random(40, D)
    rotation, _ = torch.linalg.qr(random(D, D, seed=3))
    cka = LOSSES["cka"].function
    assert abs(float(cka([StatePair(7 * states @ rotation + 1, states, 0)]))) < 1e-12
    assert float(cka([StatePair(states @ random(D, D, seed=4), states, 0)])) > 0.05
    kernels = [centred @ centred.T for centred in (x - x.mean(dim=0) for x in (states, random(40, D, seed=5)))]
    expected = 1 - (kernels[0] * kernels[1]).sum() / kernels[0].norm() / kernels[1].norm()
    torch.testing.assert_close(cka([StatePair(random(40, D, seed=5), states, 0)]), expected)


def test_projections_begin_as_the_identity_and_are_trained() -> None:
    pairs = [StatePair(random(N, D, seed=i), random(N, D, seed=i + 10), i) for i in (0, 4)]
    projections = Projections(D, [0, 4], torch.float64, torch.device("cpu"))
    projected = projections(pairs)
    for before, after in zip(pairs, projected, strict=True):
        torch.testing.assert_close(after.student, before.student)
        assert after.teacher is before.teacher and after.position == before.position
    hidden_mse(projected).backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in projections.parameters())


def test_the_map_of_vectors_begins_at_the_least_squares_and_is_trained() -> None:
    vectors, wider = random(60, D), random(60, 3 * D, seed=1)
    directions = torch.nn.functional.normalize(vectors, dim=1)
    reached = directions @ torch.linalg.qr(random(3 * D, D, seed=2))[0].T  # a rotation into the wider space
    projection = VectorProjection(vectors, reached, torch.float64)
    cosine = LOSSES["embedding_cosine"].function
    assert float(cosine(VectorPair(projection(vectors), reached))) < 1e-5
    projection = VectorProjection(vectors, wider, torch.float64)
    wanted = torch.nn.functional.normalize(wider, dim=1)
    best = torch.linalg.lstsq(directions, wanted).solution.T
    assert torch.linalg.norm(projection.weight - best) < 0.01 * torch.linalg.norm(best)
    loss = cosine(VectorPair(projection(vectors), wider))
    assert 0.2 < float(loss) < 0.9  # of directions that have nothing to do with each other it would be 1
    loss.backward()
    assert projection.weight.grad is not None and projection.weight.grad.norm() > 0


def test_masked_places_of_attention_count_nothing() -> None:
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    student, teacher = random(1, 2, 3, 3), random(1, 2, 3, 3, seed=1)
    expected = (student - teacher)[:, :, visible[0]].square().mean()
    hidden = student.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(LOSSES["attention"].function([AttentionPair(hidden, teacher, visible)]), expected)
    with pytest.raises(UserError, match="has 1 heads where the original has 2; use --loss relations"):
        LOSSES["attention"].function([AttentionPair(student[:, :1], teacher, visible)])


def test_relations_compare_different_widths() -> None:
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    student, teacher = random(1, 3, 4), random(1, 3, 6, seed=1)
    expected = torch.zeros((), dtype=torch.float64)
    for head in range(2):
        s, t = student[0, :, 2 * head : 2 * head + 2], teacher[0, :, 3 * head : 3 * head + 3]
        for token in range(3):
            q = (s[token] @ s[: token + 1].T / 2**0.5).softmax(dim=0)
            p = (t[token] @ t[: token + 1].T / 3**0.5).softmax(dim=0)
            expected += (p * (p / q).log()).sum() / 6
    torch.testing.assert_close(relation_kl([RelationPair(student, teacher, visible)], heads=2), expected)
    with pytest.raises(UserError, match="heads=4, which does not divide a width of 6"):
        relation_kl([RelationPair(student, teacher, visible)], heads=4)
