"""Carry out a plan: every pair's norms, by the method the plan gave it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from dag_hesse.estimate.exact import enter, exact_blocks
from dag_hesse.estimate.gram import gram_factors
from dag_hesse.estimate.hutchinson import Sketch
from dag_hesse.estimate.krylov import spectral_norms
from dag_hesse.estimate.norms import PARTS, Array, NormTable
from dag_hesse.estimate.products import Products
from dag_hesse.plan import Method, Plan
from dag_hesse.plan.data import SPECTRAL_STEPS
from dag_hesse.sweep import Problem

Progress = Callable[[str, int, int], None]  # (stage, sweeps done, sweeps predicted)
FIRST_PROBES, MOST_PROBES = 8, 4096  # of a source, where an rtol decides
SPECTRAL_TOLERANCE = 0.02  # of ‖H‖₂, an error that is rarely attained; what the probes leave of ‖H‖_F is as much


class _Counter:
    def __init__(self, stage: str, total: int, report: Progress | None) -> None:
        self.stage, self.total, self.report, self.done = stage, total, report, 0
        self(0)

    def __call__(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.stage, self.done, max(self.total, self.done))


def _without_work(plan: Plan, problem: Problem, table: NormTable) -> None:
    """Enter zeros that structure proves, and NaN for what was not asked."""
    structure, none = plan.structure, np.zeros(problem.groups)
    methods = {"full": plan.method, "gn": plan.gn_method, "tensor": plan.tensor_method}
    unknown = np.full(problem.groups, np.nan)
    alive = {"full": structure.alive, "gn": structure.gn_alive, "tensor": structure.tensor_alive}
    count = len(structure.names)
    for v in range(count):
        for w in range(v, count):
            for part in PARTS:
                if not alive[part][v, w]:
                    table.set_exact(part, (v, w), none)
                elif methods[part][v, w] is Method.SKIPPED:
                    table.set_exact(part, (v, w), unknown)
            if not structure.alive[v, w]:
                table.spectral[v, w] = (none, none)
            elif plan.method[v, w] is Method.SKIPPED:
                table.spectral[v, w] = (unknown, none)


def _unsettled(table: NormTable, sketches: list[Sketch], rtol: float) -> list[Sketch]:
    """Sources with a norm whose relative standard error is still above ``rtol``."""

    def open_pair(v: int, w: int, allowed: float) -> bool:
        norms = [table.frobenius[part].get((min(v, w), max(v, w))) for part in PARTS]
        return any(norm is not None and norm.stderr > allowed * norm.value for norm in norms)

    def is_open(s: Sketch) -> bool:
        allowed = rtol / (1 + 1.5 / (s.count - 1))  # Student's t over the normal's quantile: few probes know less
        return any(open_pair(v, s.source.point, allowed) for v in s.source.reads)

    return [s for s in sketches if is_open(s)]


def estimate(
    problem: Problem, plan: Plan, *, rtol: float | None = None, seed: int = 0, progress: Progress | None = None
) -> NormTable:
    """Fill a table with every pair's norms.

    Args:
        problem: model, batches and points, ready to sweep.
        plan: what to sweep.
        rtol: instead of the plan's count, eight probes a source, doubled until its relative standard errors are below
            this, or until it has 4096; then a warning says so. Spectral norms are looked for until theirs are.
        seed: of the probes; the global RNG is not touched.
        progress: called with (stage, sweeps done, sweeps predicted).
    """
    table = NormTable(problem.batch_mode)
    _without_work(plan, problem, table)
    count = len(plan.structure.names)
    pairs = [(v, w) for v in range(count) for w in range(v, count)]
    gn_known: dict[tuple[int, int], Array] = {}
    factors = None
    if plan.gram_columns:
        full = {pair for pair in pairs if plan.method[pair] is Method.GRAM}
        factors = gram_factors(problem, _Counter("gram", plan.gram_columns, progress))
        gn_known = factors.enter(table, full)
    exact = [s for s in plan.sources if s.method is Method.EXACT]
    counter = _Counter("exact", sum(s.probes for s in exact), progress) if exact else None
    for source in exact:
        enter(problem, table, source.point, exact_blocks(problem, source.point, source.reads, counter))
    sampled = [s for s in plan.sources if s.method is Method.PROBES]
    if not sampled:
        return table
    counter = _Counter("probes", sum(s.probes for s in sampled), progress)
    products = Products(problem, factors)
    sketches = [Sketch(products, source, (seed << 16) + source.point) for source in sampled]
    for sketch in sketches:
        sketch.extend(sketch.source.probes if rtol is None else FIRST_PROBES, counter)
        sketch.enter(table, gn_known)
    while rtol is not None and (todo := [s for s in _unsettled(table, sketches, rtol) if s.count < MOST_PROBES]):
        for sketch in todo:
            sketch.extend(sketch.count, counter)
            sketch.enter(table, gn_known)
    if rtol is not None and _unsettled(table, sketches, rtol):
        warnings.warn(
            f"rtol={rtol:g} is not reached with {MOST_PROBES} probes a source: the report's standard errors say what "
            "is; mode='exact' has none.",
            stacklevel=2,
        )
    _enter_spectra(products, table, sketches, plan, rtol or SPECTRAL_TOLERANCE, progress)
    return table


def _enter_spectra(
    products: Products,
    table: NormTable,
    sketches: list[Sketch],
    plan: Plan,
    tolerance: float,
    progress: Progress | None,
) -> None:
    """Spectral norms of sampled pairs: by search where they are asked for, 0 where no product has reached a point."""
    groups = products.problem.groups
    starts = {}
    for s in sketches:
        for v in s.source.reads:
            pair = (min(v, s.source.point), max(v, s.source.point))
            if plan.rank_method[pair] is Method.SKIPPED:
                table.spectral[pair] = (np.full(groups, np.nan), np.zeros(groups))
            elif v in s.start:
                starts[v, s.source.point] = s.start[v]
            else:
                table.spectral[pair] = (np.zeros(groups), np.zeros(groups))
    counter = _Counter("spectra", 2 * SPECTRAL_STEPS * len(starts), progress) if starts else None
    spectral_norms(products, table, starts, tolerance=tolerance, progress=counter)
