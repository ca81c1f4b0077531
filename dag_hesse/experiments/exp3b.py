"""Experiment 3b of the paper (§5.3, Table 4): as Experiment 3, with LayerNorm in every block."""

from __future__ import annotations

from functools import partial

from dag_hesse.experiments import exp3
from dag_hesse.experiments.data import HALVES, images
from dag_hesse.experiments.mlps import ACTIVATIONS
from dag_hesse.experiments.protocol import Claim, Experiment, Findings, Table


def tables(found: Findings) -> list[Table]:
    """Table 4, and by distance what the paper does not print."""
    own = found.table("GN-gap by activation, LayerNorm (Table 4)", list(ACTIVATIONS), ["gap", "curvature", "accuracy"])
    names = [f"gap {d}" for d in range(exp3.DEPTH)]
    return [own, found.table("GN-gap by distance at initialization", list(ACTIVATIONS), names, ["init"])]


def claims(found: Findings) -> list[Claim]:
    """The standard conditions'."""
    relu = found.ours.stat("relu", "init", "gap")
    found_last = [v for when in found.ours.checkpoints for v in found.all(list(ACTIVATIONS), when, "T 5")]
    accuracies = found.all(list(ACTIVATIONS), "final", "accuracy")
    return [
        Claim(
            "LayerNorm alone makes a gap: ReLU's is positive",
            f"{relu.mean:.3f}" if relu else "–",
            relu.mean > 0 if relu else None,
        ),
        exp3.ordered(found, "init"),
        exp3.ordered(found, "final"),
        Claim(
            "H_T = 0 for pairs with the last block, before a linear head",
            f"largest ‖H_T‖_F {max(found_last):g}" if found_last else "–",
            all(v == 0 for v in found_last) if found_last else None,
        ),
        Claim(
            "all activations are trained to more than 50 % accuracy",
            f"lowest {min(accuracies):.1%}" if accuracies else "–",
            min(accuracies) > 0.5 if accuracies else None,
        ),
    ]


EXPERIMENT = Experiment(
    name="exp3b",
    title="Experiment 3b: GN-gap by activation, with LayerNorm",
    section="§5.3, Table 4",
    data=partial(images, prepare=HALVES),
    cases=partial(exp3.cases, norm=True),
    quick=exp3.QUICK,
    tables=tables,
    claims=claims,
    figures=partial(exp3.figures, name="exp3b"),
)
