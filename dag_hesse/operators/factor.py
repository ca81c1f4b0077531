"""A square root of a Gauss–Newton matrix: one adjoint pass for every direction in which the loss is curved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError
from dag_hesse.estimate.gram import factor_rows
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.sweep import Problem


class Factor(NamedTuple):
    """G = rowsᵀ diag(signs) rows.

    Attributes:
        rows: (r, n), r at most the number of the batch's outputs: a sample's are J_bᵀ times a root of its loss Hessian.
        signs: (r,): 1, and -1 where the loss is not convex in the model's output.
    """

    rows: Tensor
    signs: Tensor


def factor_height(problem: Problem) -> int:
    """Most rows that a factor may have: one for each element of what the loss consumes."""
    return sum(entry.graph.nodes[k].numel for entry in problem.entries for k in entry.graph.out)


def factored(problem: Problem, order: Sequence[int | None], form: VectorForm, budget: Budget) -> Factor:
    """As :meth:`dag_hesse.GGNOperator.factor`; ``order`` says which point of the problem each segment is."""
    if problem.groups > 1:
        raise OptionError("batch_mode='joint' has a block per sample and no one factor: take batch_mode='shared'.")
    height = factor_height(problem)
    what, instead = f"a factor of up to {height} × {form.size}", "take fewer samples or parameters, or products"
    budget.check(height * form.size * form.dtype.itemsize, what, instead)
    pieces, signs = [], []
    for entry, lin in problem.linearizations():
        found, sign = factor_rows(problem, entry, lin, None)
        count = sign.numel()
        segments = [
            torch.zeros(count, size, dtype=form.dtype, device=form.device)
            if k is None
            else found[k][0].to(form.dtype).reshape(count, size)
            for k, size in zip(order, form.sizes, strict=True)
        ]
        pieces.append(entry.scale**0.5 * torch.cat(segments, dim=1))
        signs.append(sign.reshape(-1).to(form.dtype))
    return Factor(torch.cat(pieces), torch.cat(signs))
