"""How alike every position of a student's map is to the same position of its teacher's, against all others: the
diagonal of UniNet's row-wise softmax (eqs. 8 and 9), without ever holding the HW×HW matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-8
"""Of eqs. 9 and 10."""

BLOCK_BYTES = 64 << 20
"""Of a block of rows of the similarity matrices of a batch, unless `rows` says how many."""


def log_similarity(student: Tensor, teacher: Tensor, temperature: float, rows: int | None = None) -> Tensor:
    """log diag(m̂) of m = ŝ · t̂ᵀ / T and m̂ = exp(m) / (Σ_k exp(m(:, k)) + ε), in float32 or better.

    Args:
        student, teacher: B×C×h×w; every position is scaled to unit length.
        temperature: T.
        rows: student positions whose similarities are held at once; null takes as many as fit 64 MiB.

    Returns:
        B×N, N = h·w.
    """
    with torch.autocast(student.device.type, enabled=False):
        unit = [normalize(maps if maps.dtype == torch.float64 else maps.float(), dim=1) for maps in (student, teacher)]
        s, t = (maps.flatten(2).mT.contiguous() for maps in unit)  # each B N C
        if rows is None:
            rows = max(1, BLOCK_BYTES // (s.element_size() * s.shape[0] * s.shape[1]))
        return _LogDiagonal.apply(s, t, temperature, rows)


class _LogDiagonal(torch.autograd.Function):
    """Forward and backward pass both walk over blocks of rows; the latter computes the similarities anew.

    With p_ik = exp(m_ik) / (Σ_k exp(m_ik) + ε), the derivative of output i by m_ik is δ_ik − p_ik.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, temperature: float, rows: int) -> Tensor:
        """B×N×C each to B×N."""
        totals = [torch.logsumexp(block @ t.mT / temperature, dim=2) for block in s.split(rows, dim=1)]
        total = torch.cat(totals, dim=1)
        total = torch.logaddexp(total, torch.full_like(total, math.log(EPSILON)))  # B N
        ctx.save_for_backward(s, t, total)
        ctx.temperature, ctx.rows = temperature, rows
        return (s * t).sum(2) / temperature - total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of s and t."""
        s, t, total = ctx.saved_tensors
        gradient = gradients[0][:, :, None]  # B N 1
        of_s = gradient * t if ctx.needs_input_grad[0] else None
        of_t = gradient * s if ctx.needs_input_grad[1] else None
        for start in range(0, s.shape[1], ctx.rows):
            block = slice(start, start + ctx.rows)
            share = s[:, block] @ t.mT  # B r N
            share.div_(ctx.temperature).sub_(total[:, block, None]).exp_().mul_(gradient[:, block])
            if of_s is not None:
                of_s[:, block] -= share @ t
            if of_t is not None:
                of_t -= share.mT @ s[:, block]
        scaled = [None if g is None else g / ctx.temperature for g in (of_s, of_t)]
        return scaled[0], scaled[1], None, None
