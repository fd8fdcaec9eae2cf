"""The diagonal of the similarity matrices against the whole matrix, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unianom.methods.uninet import BLOCK_BYTES, EPSILON, log_similarity


def whole(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Position after position, as eqs. 8 and 9 are written; B×N."""
    batch, _, height, width = student.shape
    rows = []
    for b in range(batch):
        s = [student[b, :, i // width, i % width] for i in range(height * width)]
        t = [teacher[b, :, i // width, i % width] for i in range(height * width)]
        row = []
        for i in range(height * width):
            similar = [(s[i] @ t[k]) / (s[i].norm() * t[k].norm() * temperature) for k in range(height * width)]
            row.append((similar[i].exp() / (sum(m.exp() for m in similar) + EPSILON)).log())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def maps(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("temperature", [2.0, 0.1])
@pytest.mark.parametrize("rows", [None, 1, 5, 6, 100])
def test_values_and_gradients_are_those_of_the_whole_matrix(temperature, rows):
    student, teacher = maps(0, 2, 3, 2, 3), maps(1, 2, 3, 2, 3)
    expected = whole(student, teacher, temperature)
    found = log_similarity(student, teacher, temperature, rows)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64).view(2, 6)
    of_found = torch.autograd.grad((found * weights).sum(), (student, teacher))
    of_expected = torch.autograd.grad((expected * weights).sum(), (student, teacher))
    for one, other in zip(of_found, of_expected):
        torch.testing.assert_close(one, other)


def test_gradients_agree_with_finite_differences():
    student, teacher = maps(2, 1, 2, 2, 2), maps(3, 1, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda s, t: log_similarity(s, t, 0.3, rows=3), (student, teacher))


def test_a_teacher_without_gradient_gets_none():
    student, teacher = maps(0, 1, 3, 2, 2), maps(1, 1, 3, 2, 2).detach()
    log_similarity(student, teacher, 1.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_cold_similarities_do_not_overflow():
    """exp(1 / 0.005) is beyond float32."""
    same = maps(0, 1, 8, 3, 3).detach().float()
    logs = log_similarity(same, same, 0.005)
    assert torch.isfinite(logs).all()
    torch.testing.assert_close(logs, torch.zeros(1, 9), atol=1e-3, rtol=0)


def test_the_epsilon_counts():
    """Against opposite directions alone, exp(m) is as small as ε."""
    student = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    temperature = 1 / math.log(1 / EPSILON)  # exp(−1 / T) = ε
    found = log_similarity(student, -student, temperature)
    assert found.item() == pytest.approx(math.log(0.5), rel=1e-5)


def test_low_precision_is_left_at_the_door():
    student, teacher = maps(0, 1, 4, 3, 3).detach().float(), maps(1, 1, 4, 3, 3).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = log_similarity(student, teacher, 0.1)
    assert torch.equal(found, log_similarity(student, teacher, 0.1))


def test_no_block_holds_a_whole_matrix_of_the_published_size(monkeypatch):
    """64² positions of eight images: 0.5 GB in one piece."""
    largest = 0
    real = torch.Tensor.logsumexp

    def watch(block: Tensor, dim: int) -> Tensor:
        nonlocal largest
        largest = max(largest, block.numel() * block.element_size())
        return real(block, dim)

    monkeypatch.setattr(torch, "logsumexp", watch)
    generator = torch.Generator().manual_seed(0)
    log_similarity(torch.randn(8, 2, 64, 64, generator=generator), torch.randn(8, 2, 64, 64, generator=generator), 2.0)
    assert 0 < largest <= BLOCK_BYTES
