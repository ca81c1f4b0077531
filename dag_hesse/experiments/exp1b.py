"""Experiment 1b of the paper (Appendix N.1, Table N.2, Figure N.1): decay where its condition holds, ρ ≤ 1.

Plain MLPs of 8, 12 and 16 blocks with spectral normalization and without LayerNorm; residual ones as in Experiment 1.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

from torch import nn

from dag_hesse.experiments import exp1
from dag_hesse.experiments.data import HALVES, images
from dag_hesse.experiments.measure import Batch, Values, bound
from dag_hesse.experiments.mlps import plain_mlp, residual_mlp
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Table
from dag_hesse.experiments.training import Recipe

DEPTHS = (8, 12, 16)


def measure(model: nn.Module, batch: Batch) -> Values:
    """As in Experiment 1, and the bound (10) for every pair and sample."""
    return exp1.measure(model, batch) | bound(model, batch)


def cases(full: bool) -> list[Case]:
    """Spectral normalization, and the residual control."""
    recipe = Recipe() if full else Recipe(epochs=1)
    found = []
    for depth in DEPTHS if full else DEPTHS[:1]:
        plain = partial(plain_mlp, depth, norm=False, spectral=True)
        found.append(Case(f"{depth}/plain", plain, measure, recipe=recipe))
        found.append(Case(f"{depth}/residual", partial(residual_mlp, depth), exp1.measure, recipe=recipe))
    return found


def tables(found: Findings) -> list[Table]:
    """Table N.2, the bound, and R̄(d) of Figure N.1."""
    own = found.cases()
    made = [found.table("Jacobians, growth and accuracy (Table N.2)", own, exp1.GROWTH, note=exp1.NOTE)]
    note = (
        "rate: sρ of a sample, the largest. applies: share of pairs and samples with sρ < 1; holds: share of those "
        "within the bound; slack: bound / measured, the least."
    )
    plain = found.cases("*/plain")
    made.append(found.table("Bound (10), pair by pair", plain, ["rate", "applies", "holds", "slack"], note=note))
    for case in plain:
        wanted = [f"{letter} {d}" for letter in "RC" for d in range(exp1.depth_of(case))]
        made.append(found.table(f"{case} with spectral normalization (Figure N.1)", [case], wanted))
    return made


def claims(found: Findings) -> list[Claim]:
    """Appendix N.1 (a) to (c)."""
    plain = found.cases("*/plain")
    rho, rate = (found.all(plain, "init", name) for name in ("rho", "rate"))
    held = [v for when in found.ours.checkpoints for v in found.all(plain, when, "holds") if not math.isnan(v)]
    rates = [found.ours.stat(case, "init", "lambda published") for case in plain]
    means = [stat.mean for stat in rates if stat]
    eq8 = found.all(plain, "init", "lambda")
    falls = [
        all(near > far for near, far in itertools.pairwise(means_of(found, case)))
        for case in plain
        if means_of(found, case)
    ]
    rate_text = (
        f"as the authors compute it {', '.join(f'{m:.3f}' for m in means)}; by eq. (8) {min(eq8):.2f} to {max(eq8):.2f}"
        if means
        else "–"
    )
    return [
        Claim(
            "ρ ≤ 1 at init, all depths and samples",
            f"largest mean over samples {max(rho):.3f}, sρ {max(rate):.3f}" if rho else "–",
            max(rate) <= 1 if rate else None,
        ),
        Claim(
            "bound (10) holds for every pair and sample where sρ < 1, at all checkpoints",
            f"least share {min(held):g}" if held else "–",
            min(held) == 1 if held else None,
        ),
        exp1.decay(found, plain, "init"),
        Claim(
            "R̄(d) falls at every distance at init",
            f"{sum(falls)} of {len(falls)} depths",
            all(falls) if falls else None,
        ),
        Claim(
            "λ₁ ≈ −1.0 at init, all depths (to a decimal)",
            rate_text,
            all(round(m, 1) == -1.0 for m in means) if means else None,
        ),
    ]


def means_of(found: Findings, case: str) -> list[float]:
    """R̄(d) at init."""
    stats = (found.ours.stat(case, "init", f"R {d}") for d in range(exp1.depth_of(case)))
    return [stat.mean for stat in stats if stat]


def figures(found: Findings) -> dict[str, Any]:
    """Figure N.1."""
    return exp1.figures(found, "exp1b")


EXPERIMENT = Experiment(
    name="exp1b",
    title="Experiment 1b: decay under spectral normalization",
    section="Appendix N.1, Table N.2, Figure N.1",
    data=partial(images, prepare=HALVES),
    cases=cases,
    quick="depth 8 alone, 2 seeds instead of 5, 1 epoch instead of 50.",
    tables=tables,
    claims=claims,
    figures=figures,
    remarks=(
        "At L = 16 the published C̄(0) is 0.8375, though C(v, v) = 1 by definition: the authors' code counts couplings "
        "as 0 where √(R(v,v) R(w,w)) < 1e-12. Counted so, ours at init are 0.8375, 0.8430 and 0.8546 at d = 0, 1, 2, "
        "as published; C here has no threshold.",
    ),
)
