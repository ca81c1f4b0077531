"""Ablation of the paper (Appendix N.6, Table N.6): what 30 probes do to gaps, and to stable ranks.

The gaps are those of Experiment 3 for smooth activations, exact and by 30 Rademacher probes, over 20 draws of them;
stated standard errors are held against what the draws show. The stable ranks are those of Experiment 1's plain network
of 12 blocks at initialization, exact, and from 30 probes for ‖H‖_F² over 20 power steps for ‖H‖₂², as the paper has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dag_hesse.experiments import exp3
from dag_hesse.experiments.data import HALVES, images
from dag_hesse.experiments.drawing import Curve, Panel, draw
from dag_hesse.experiments.measure import Batch, Values, exact_map, gaps
from dag_hesse.experiments.mlps import plain_mlp
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Table
from dag_hesse.experiments.training import Recipe

PROBES, DRAWS, STEPS, RANK_DRAWS = 30, 20, 20, 500
RANK, DEPTH = "stable-rank", 12
GAPS = ["gap exact", "gap probes", "excess", "spread", "z"]


def measure(model: nn.Module, batch: Batch) -> Values:
    """The gap of all pairs, exact and by probes.

    Returns:
        ``gap exact``; ``gap probes``, the mean over draws; ``excess`` and ``spread``, its distance from the exact one
        and the standard deviation of a draw, in percent; ``z``, the root mean square over draws and pairs of
        (estimate − exact) / stated standard error of a pair's gap, which is 1 where what is stated is right.
    """
    truth = exact_map(model, batch, "blocks.*")
    exact = gaps(truth)["gap"]
    drawn, scores = [], []
    for seed in range(DRAWS):
        report = exact_map(model, batch, "blocks.*", mode="probes", probes=PROBES, seed=seed)
        drawn.append(gaps(report)["gap"])
        stated = report.stderr["gn_gap"]
        scores.append(((report.gn_gap - truth.gn_gap)[stated > 0] / stated[stated > 0]) ** 2)
    mean = float(np.mean(drawn))
    return {
        "gap exact": exact,
        "gap probes": mean,
        "excess": 100 * (mean / exact - 1),
        "spread": 100 * float(np.std(drawn)) / exact,
        "z": float(np.sqrt(np.concatenate(scores).mean())),
    }


def ranks(model: nn.Module, batch: Batch) -> Values:
    """Stable ranks of the nearest and the furthest block: exact, and as the paper's estimator gives them."""
    report = exact_map(model, batch, "blocks.*")
    found: Values = {}
    for d in (0, len(report) - 1):
        drawn = estimated_ranks(report.block(0, d), RANK_DRAWS)
        found |= {
            f"D exact {d}": float(report.stable_rank[0, d]),
            f"D probes {d}": float(drawn.mean()),
            f"D spread {d}": float(drawn.std(correction=0)),
            f"D below 1 {d}": float((drawn < 1).double().mean()),
        }
    return found


def estimated_ranks(block: Tensor, draws: int, probes: int = PROBES, steps: int = STEPS) -> Tensor:
    """mean‖H z‖² over probes / ‖H‖₂² by power steps on HᵀH from a random start, once a draw."""
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (draws, block.shape[1], probes), generator=g, dtype=torch.int8)
    squares = (block @ (2.0 * signs - 1).to(block)).pow(2).sum(1).mean(1)
    x = torch.randn(block.shape[1], draws, generator=g, dtype=block.dtype)
    for _ in range(steps):
        x = block.T @ (block @ (x / x.norm(dim=0)))
    return squares / (block @ (x / x.norm(dim=0))).pow(2).sum(0)


def cases(full: bool) -> list[Case]:
    """Smooth activations as in Experiment 3, and the network of the stable ranks."""
    recipe = Recipe(epochs=exp3.EPOCHS if full else 0)
    made = [
        Case(
            name, partial(plain_mlp, exp3.DEPTH, exp3.WIDTH, activation=name, norm=False), measure, exp3.SAMPLES, recipe
        )
        for name in exp3.SMOOTH
    ]
    return [*made, Case(RANK, partial(plain_mlp, DEPTH), ranks, recipe=Recipe(epochs=0))]


def tables(found: Findings) -> list[Table]:
    """Table N.6, and stable ranks."""
    note = f"excess, spread: in percent. Means over {DRAWS} draws of {PROBES} probes, and over seeds."
    names = [f"D {what} {d}" for d in (0, DEPTH - 1) for what in ("exact", "probes", "spread", "below 1")]
    return [
        found.table("GN-gap, exact and by 30 probes (Table N.6)", exp3.SMOOTH, GAPS, note=note),
        found.table("Stable rank of the first block with itself and with the last", [RANK], names, ["init"]),
    ]


def excess(found: Findings) -> Iterator[tuple[str, str, float, float]]:
    """Activation, checkpoint, mean excess in percent, and the mean's standard error over seeds."""
    for name, when in itertools.product(exp3.SMOOTH, found.ours.checkpoints):
        stat = found.ours.stat(name, when, "excess")
        if stat and stat.count > 1:
            yield name, when, stat.mean, (stat.std or 0.0) / (stat.count - 1) ** 0.5


def claims(found: Findings) -> list[Claim]:
    """Appendix N.6."""
    excesses = list(excess(found))
    means = [mean for _, _, mean, _ in excesses]
    scatter = max((v for when in found.ours.checkpoints for v in found.all(exp3.SMOOTH, when, "spread")), default=0.0)
    below = found.ours.values(RANK, "init", f"D below 1 {DEPTH - 1}")
    return [
        Claim(
            "30 probes are off by less than 1 % in the mean over draws and seeds",
            f"{min(means):+.2f} to {max(means):+.2f} %; one draw scatters by up to {scatter:.1f} %" if means else "–",
            max(map(abs, means)) < 1 if means else None,
        ),
        Claim(
            "they overestimate the gap systematically: the mean excess is more than two of its standard errors above 0",
            ", ".join(f"{name}, {when}: {mean:+.2f} ± {error:.2f} %" for name, when, mean, error in excesses),
            all(mean > 2 * error for *_, mean, error in excesses) if excesses else None,
        ),
        Claim(
            "D < 1 at L = 12 for distant pairs is noise of ‖H‖_F (exact: D ≥ 1)",
            f"share of draws below 1: {float(np.mean(below)):.1%}" if below else "–",
            min(found.ours.values(RANK, "init", f"D exact {DEPTH - 1}")) >= 1 and max(below) > 0 if below else None,
        ),
    ]


def figures(found: Findings) -> dict[str, Any]:
    """Excess over activation."""
    curves = []
    for when, style in (("init", "-"), ("final", ":")):
        curves.append(Curve(when, list(range(len(exp3.SMOOTH))), *found.both(exp3.SMOOTH, when, "excess"), style))
    title = "excess of the gap by 30 probes (crosses: paper)"
    return {"ablation": draw([Panel(title, curves, ", ".join(exp3.SMOOTH), "%", False)])}


EXPERIMENT = Experiment(
    name="ablation",
    title="Ablation: exact against 30 probes",
    section="Appendix N.6, Table N.6",
    data=partial(images, prepare=HALVES),
    cases=cases,
    quick="at initialization alone, 2 seeds instead of 5.",
    tables=tables,
    claims=claims,
    figures=figures,
)
