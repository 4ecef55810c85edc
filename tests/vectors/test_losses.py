"""The terms of Jasper and Stella against their definitions, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from layer_surgery.vectors.losses import cosine_distance, order_error, similarity_error
from layer_surgery.vectors.relative import active_terms, relative_similarity
from layer_surgery.vectors.unit import unit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_relative(b: Tensor, a: Tensor, margin: float) -> Tensor:
    """Return the mean over all p, q with a_p > a_q, one term each."""
    terms = [
        torch.relu(b[q] - b[p] + margin) for p in range(len(a)) for q in range(len(a)) if float(a[p]) > float(a[q])
    ]
    return torch.stack(terms).mean() if terms else 0.0 * b.sum()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("margin", [0.0, 0.015, 0.7])
@pytest.mark.parametrize("levels", [None, 3])
def test_the_relative_term_and_its_gradient_are_by_definition(n: int, margin: float, levels: int | None) -> None:
    b, a = random(n, seed=1), random(n, seed=2)
    if levels is not None:  # equal similarities, and terms that are zero just so
        b, a = (b * levels).round() / levels, (a * levels).round() / levels
    student, twin = b.clone().requires_grad_(), b.clone().requires_grad_()
    value, expected = relative_similarity(student, a, margin), naive_relative(twin, a, margin)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-12, atol=1e-14)


def test_every_active_term_is_counted_once_on_each_side() -> None:
    b, a = random(200, seed=3), random(200, seed=4)
    counts = active_terms(b, a, 0.1)
    active = (a[:, None] > a[None, :]) & (b[None, :] + 0.1 > b[:, None])  # [p, q]
    assert torch.equal(counts.as_lower, active.sum(dim=0))
    assert torch.equal(counts.as_higher, active.sum(dim=1))


def test_the_relative_term_of_many_pairs_needs_no_matrix_of_them() -> None:
    """A matrix of all pairs of pairs would have 4 billion entries."""
    pairs = 1 << 16
    a = torch.arange(pairs, dtype=torch.float64)
    # In the order of the teacher, one margin apart: only neighbours are nearer than two margins.
    assert float(relative_similarity(a, a, 1.5)) == pytest.approx(0.5 * (pairs - 1) / (pairs * (pairs - 1) / 2))
    # In the opposite order: the mean difference of two numbers below n is (n + 1) / 3.
    assert float(relative_similarity(-a, a, 0.0)) == pytest.approx((pairs + 1) / 3)


def test_the_order_of_texts_changes_nothing() -> None:
    s, t = normalize(random(9, 4), dim=1), normalize(random(9, 6, seed=1), dim=1)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert float(order_error(s[shuffled], t[shuffled])) == pytest.approx(float(order_error(s, t)), rel=1e-12)


def test_the_terms_are_those_of_the_paper() -> None:
    student, teacher = random(5, 4, seed=5), random(5, 4, seed=6)
    s, t = (each / each.pow(2).sum(dim=1, keepdim=True).sqrt() for each in (student, teacher))
    pairs = [(i, j) for i in range(5) for j in range(i)]
    b, a = (torch.stack([each[i] @ each[j] for i, j in pairs]) for each in (s, t))
    assert float(cosine_distance(s, t)) == pytest.approx(sum(1 - float(s[i] @ t[i]) for i in range(5)))
    squares = [(float(s[i] @ s[j]) - float(t[i] @ t[j])) ** 2 for i in range(5) for j in range(5)]
    assert float(similarity_error(s, t)) == pytest.approx(sum(squares) / 25)
    assert float(order_error(s, t)) == pytest.approx(float(naive_relative(b, a, 0.015)))


def total(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    s, t = unit(student), unit(teacher)
    return 10 * cosine_distance(s, t) + 200 * similarity_error(s, t) + 20 * order_error(s, t, margin)


def test_the_gradient_is_that_of_finite_differences() -> None:
    teacher = random(4, 5, seed=8)
    student = random(4, 5, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: total(each, teacher, 0.015), student)


def test_a_student_has_nothing_to_learn_from_itself_but_a_margin() -> None:
    vectors = random(6, 3, seed=9)
    student = vectors.clone().requires_grad_()
    value = total(student, vectors, 0.0)
    value.backward()
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-10)
    torch.testing.assert_close(student.grad, torch.zeros_like(vectors), rtol=0, atol=1e-9)


def test_a_smaller_student_has_no_cosine_term() -> None:
    small, large = unit(random(6, 3)), unit(random(6, 8, seed=1))
    with pytest.raises(ValueError, match="3 numbers where the teacher's have 8"):
        cosine_distance(small, large)
    assert float(similarity_error(small, large)) > 0 and float(order_error(small, large)) > 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_vector_without_direction_is_refused(value: float) -> None:
    vectors = random(4, 3)
    vectors[2] = value
    with pytest.raises(ValueError, match="text 2"):
        unit(vectors)


def test_refused_similarities() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[4\]"):
        relative_similarity(random(3), random(4), 0.0)
    with pytest.raises(ValueError, match="not finite"):
        relative_similarity(torch.tensor([1.0, torch.nan]), random(2), 0.0)
