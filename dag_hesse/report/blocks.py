"""Exact blocks on demand, while the model is still what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dag_hesse.errors import StaleError
from dag_hesse.estimate import exact_blocks
from dag_hesse.ranks import agree, together
from dag_hesse.sweep import Problem

if TYPE_CHECKING:
    from dag_hesse.storage import BlockMatrix


def present(reader: BlockReader | None) -> BlockReader:
    """The reader of a report.

    Raises:
        StaleError: a report that was loaded or copied has none.
    """
    if reader is None:
        raise StaleError(
            "a loaded or copied report holds maps: run analyze() again for report.block() and report.blocks()."
        )
    return reader


class BlockReader:
    """Computes H[v, w] or one of its parts by identity probes from the smaller side."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._renewals = problem, problem.renewals
        problem.release()

    def _check(self, wish: str) -> None:
        """Raise :class:`StaleError` where blocks would not be those of the report."""
        if self.problem.renewals != self._renewals:
            raise StaleError(f"a later map was made of the same model since: take that one, or analyze() again {wish}.")
        self.problem.check("analyze()", f"analyze it again {wish}.")

    def __call__(self, v: int, w: int, part: str) -> Tensor:
        problem = self.problem
        self._check("to read blocks")
        size = problem.dim(v) * problem.dim(w) * problem.groups
        need = 3 * size * problem.dtype.itemsize * (1 if part == "full" else 2)
        names = [problem.points[k].name for k in (v, w)]
        agree(problem.ranks, "block()", v=names[0], w=names[1], part=part)
        with together(problem.ranks, "a block"):
            problem.budget.check(
                need, f"the block of {names[0]!r} and {names[1]!r}", "store it low-rank by report.blocks()"
            )
        from_w = problem.dim(w) <= problem.dim(v)
        source, target = (w, v) if from_w else (v, w)
        parts = exact_blocks(problem, source, (target,))[target]
        problem.release()
        found = {"full": parts.full, "gn": parts.gn, "tensor": parts.tensor}[part]
        if found is None:
            shape = (problem.dim(source), problem.groups, problem.dim(target))
            found = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
        block = found.permute(1, 2, 0) if from_w else found.transpose(0, 1)  # (groups, d_v, d_w)
        if problem.batch_mode == "joint" and problem.groups > 1:
            return torch.block_diag(*block)
        return block if problem.batch_mode == "per_sample" else block[0].contiguous()

    def matrix(self, part: str, parts: bool, options: dict[str, Any]) -> BlockMatrix:
        """All blocks, stored."""
        from dag_hesse.progress import shown
        from dag_hesse.storage.options import wanted
        from dag_hesse.storage.pose import of_problem

        progress = options.pop("progress", None)
        agree(self.problem.ranks, "blocks()", part=part, parts=parts, **options)
        with shown(progress) as told:
            chosen = wanted(**options)
            self._check("to store blocks")
            return of_problem(self.problem, "analyze()", part, parts, chosen, told)
