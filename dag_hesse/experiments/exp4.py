"""Experiment 4 of the paper (§5.4, Tables 6 and N.4, Figures 6 and N.2): two branches that a merge brings together.

Diamond MLPs of width 32: a stem, branches of 1, 2 or 3 blocks, a sum or σ(W [a, b]), a head; ReLU and SiLU; 50 epochs
on CIFAR-10, the Hessian of 32 test images. The gap is that of the last blocks of both branches.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dag_hesse.experiments.data import HALVES, images
from dag_hesse.experiments.drawing import Curve, Panel, draw, over_distance
from dag_hesse.experiments.measure import Batch, Values, exact_map, pair_gap, step_jacobians
from dag_hesse.experiments.mlps import DiamondMLP
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Table
from dag_hesse.experiments.training import Recipe
from dag_hesse.report import CurvatureReport

DEPTHS, MERGES, ACTIVATIONS = (1, 2, 3), ("sum", "cat"), ("relu", "silu")
LINEAR = ["sum_relu", "sum_silu", "cat_relu"]


def measure(model: nn.Module, batch: Batch) -> Values:
    """R̄ within and across branches by distance, the gap at the merge, norms of Jacobians."""
    depth = len(model.a)  # type: ignore[arg-type]
    report = exact_map(model, batch, ["a.*", "b.*"])
    last = f"a.{depth - 1}", f"b.{depth - 1}"
    return branches(report, depth) | pair_gap(report, *last) | jacobians(model, batch, depth)


def branches(report: CurvatureReport, depth: int) -> Values:
    """Means of R by distance; across, it is that of the path through the merge."""
    a, b = ([report.index(f"{branch}.{k}") for k in range(depth)] for branch in "ab")
    groups: dict[str, list[float]] = {}
    for name, pairs in (
        ("A", itertools.combinations_with_replacement(a, 2)),
        ("B", itertools.combinations_with_replacement(b, 2)),
        ("cross", itertools.product(a, b)),
    ):
        for i, j in pairs:
            groups.setdefault(f"{name} {report.distance[i, j]}", []).append(float(report.resonance[i, j]))
    return {name: float(np.mean(values)) for name, values in groups.items()}


def jacobians(model: nn.Module, batch: Batch, depth: int) -> Values:
    """ρ over the blocks and the merge, norms averaged over samples; a σ(W [a, b]) is taken by both inputs together."""
    names = {branch: ["stem", *(f"{branch}.{k}" for k in range(depth))] for branch in "ab"}
    steps = [step for own in names.values() for step in itertools.pairwise(own)]
    into = [(own[-1], "merge") for own in names.values()]
    points = list(dict.fromkeys([*names["a"], *names["b"], "merge"]))
    *blocks, left, right = step_jacobians(model, batch, [*steps, *into], points)
    merge = torch.cat([left, right], -1) if model.kind == "cat" else left
    norms = [float(torch.linalg.matrix_norm(block, 2).mean()) for block in (*blocks, merge)]
    return {"rho": max(norms), "rho mean": float(np.mean(norms))}


def cases(full: bool) -> list[Case]:
    """Depth of the branches, merge and activation."""
    recipe = Recipe() if full else Recipe(epochs=1)
    return [
        Case(f"{depth}/{merge}_{name}", partial(DiamondMLP, depth, merge, name), measure, recipe=recipe)
        for depth in (DEPTHS if full else (2,))
        for merge in MERGES
        for name in ACTIVATIONS
    ]


def tables(found: Findings) -> list[Table]:
    """Tables 6 and N.4, and R̄ of Figure N.2."""
    whole = found.table("GN-gap at the merge (Tables 6 and N.4)", found.cases(), ["gap", "T", "GN", "rho", "accuracy"])
    wanted = [f"{letter} {d}" for letter in ("A", "B", "cross") for d in range(2 * max(DEPTHS) + 1)]
    return [whole, *(found.table(f"R̄ in branches, {case}", [case], wanted) for case in found.cases("2/*"))]


def claims(found: Findings) -> list[Claim]:
    """H4.1 to H4.3."""
    linear = [case for case in found.cases() if case.split("/")[1] in LINEAR]
    smooth = found.cases("*/cat_silu")
    zeros = [value for when in found.ours.checkpoints for value in found.all(linear, when, "T")]
    init = found.all(smooth, "init", "gap")
    return [
        Claim(
            "H4.3: H_T = 0 for sum merges and for cat with ReLU, all k, seeds and checkpoints (paper: about 1e-7)",
            f"largest ‖H_T‖_F {max(zeros):g} of {len(zeros)}" if zeros else "–",
            all(value == 0 for value in zeros) if zeros else None,
        ),
        Claim(
            "H4.3: gap > 1 at init for cat with SiLU, k = 1, 2, 3 (means over seeds)",
            ", ".join(f"{case}: {stat.mean:.2f}" for case in smooth if (stat := found.ours.stat(case, "init", "gap"))),
            all(stat.mean > 1 for case in smooth if (stat := found.ours.stat(case, "init", "gap"))) if init else None,
        ),
        monotone(
            found, "H4.1: R̄ within branches falls with distance, all checkpoints", ("A", "B"), found.ours.checkpoints, 1
        ),
        monotone(found, "H4.2a: R̄ across branches falls with distance at init", ("cross",), ["init"], 1),
        monotone(
            found, "H4.2b: R̄ across branches grows with distance at the end of training", ("cross",), ["final"], -1
        ),
    ]


def monotone(found: Findings, text: str, letters: tuple[str, ...], checkpoints: list[str], sign: int) -> Claim:
    """Whether means over seeds fall (or grow) from each distance to the next."""
    steps, wrong = 0, []
    for case, when, letter in itertools.product(found.cases(), checkpoints, letters):
        stats = [stat for d in range(2 * max(DEPTHS) + 1) if (stat := found.ours.stat(case, when, f"{letter} {d}"))]
        for near, far in itertools.pairwise(stats):
            steps += 1
            if sign * (near.mean - far.mean) <= 0:
                wrong.append(f"{case} {when} {letter} ({near.mean:.3g} → {far.mean:.3g})")
    found_text = f"{steps - len(wrong)} of {steps} steps" + (f"; not {', '.join(wrong[:6])}" if wrong else "")
    return Claim(text, found_text, not wrong if steps else None)


def figures(found: Findings) -> dict[str, Any]:
    """Figures 6 (without the zeros, which have no place on a logarithmic axis) and N.2."""
    curves = []
    for when, style in (("init", "-"), ("final", ":")):
        own = found.cases("*/cat_silu")
        curves.append(
            Curve(
                f"cat + SiLU, {when}; all others exactly 0",
                [int(case[0]) for case in own],
                *found.both(own, when, "gap"),
                style,
            )
        )
    panels = [Panel("GN-gap at the merge (crosses: paper)", curves, "blocks in a branch", "GN-gap")]
    for when in ("init", "final"):
        across = [over_distance(found, case, when, "cross", case.split("/")[1]) for case in found.cases("2/*")]
        panels.append(Panel(f"R̄ across branches, k = 2, {when}", across, "distance", "R̄(d)"))
    return {"exp4": draw(panels)}


EXPERIMENT = Experiment(
    name="exp4",
    title="Experiment 4: the tensor term at a merge",
    section="§5.4, Tables 6 and N.4, Figures 6 and N.2",
    data=partial(images, prepare=HALVES),
    cases=cases,
    quick="branches of 2 blocks alone, 2 seeds instead of 5, 1 epoch instead of 50.",
    tables=tables,
    claims=claims,
    figures=figures,
)
