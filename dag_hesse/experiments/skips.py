"""Beyond the paper: coupling across the skips of a DenseNet and a U-Net (Remarks 36 and 74).

The paper predicts from its path decomposition, and leaves to be validated, that resonance grows in DenseNets, whose
many paths maximize the sum of R over pairs, and that skips from encoder to decoder keep C high in a U-Net.

Points are the layers of the chain that is left when skips are taken away, and distance is that along the chain. Pairs
that a skip joins are held against pairs as far apart that none joins, in the same network, and against the same pairs
in the same architecture without skips. With ReLU all blocks between activations are Gauss–Newton's, so that
:func:`dag_hesse.theory.cut_edges` (Theorem 33) tells what a skip carries of the whole block between its ends: the
share ‖H − H without‖/‖H‖, above 1 where its paths and the others cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from dag_hesse.experiments.drawing import Curve, Panel, draw, over_distance
from dag_hesse.experiments.measure import Batch, Values, exact_map, in_double
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Table
from dag_hesse.experiments.skipped import DenseNet, Pair, UNet, classified, noisy
from dag_hesse.experiments.training import Recipe
from dag_hesse.theory import cut_edges

NETWORKS = {"densenet": "DenseNet", "unet": "U-Net"}
QUICK_EPOCHS, EPOCHS = 4, 20
SAMPLES, RATE = 8, 3e-3
LETTERS = {"R": "resonance", "C": "coupling"}


def measure(model: nn.Module, batch: Batch) -> Values:
    """R̄ and C̄ over pairs at least two apart, by distance along the chain, and what each skip carries.

    Returns:
        ``C skip 2``: the mean over pairs at distance 2 that a skip joins (in a network without: would join);
        ``C none 2``: over the others; the same of R; ``R sum``: over all pairs of two layers;
        ``carried 2``: the mean share of the block between a skip's ends that it carries; ``T``: the largest ‖H_T‖.
    """
    chain, skips = list(model.chain), list(model.skips)  # type: ignore[arg-type]
    report = exact_map(model, batch, chain)
    order = [report.index(name) for name in chain]
    found: Values = {"T": float(report.tensor_norm.max())}
    for letter, metric in LETTERS.items():
        values = report.values[metric][np.ix_(order, order)]
        found |= {f"{letter} {name}": value for name, value in means(values, chain, skips).items()}
    pairs = np.triu_indices(len(chain), 1)
    found["R sum"] = float(report.resonance[pairs].sum())
    return found | (carried(model, batch, chain, skips) if model.skip else {})


def means(values: Any, chain: Sequence[str], skips: Sequence[Pair]) -> Values:
    """Over pairs with a skip and without, by distance along the chain."""
    groups: dict[str, list[float]] = {}
    for i, j in itertools.combinations(range(len(chain)), 2):
        if j - i > 1:
            kind = "skip" if (chain[i], chain[j]) in skips else "none"
            groups.setdefault(f"{kind} {j - i}", []).append(float(values[i, j]))
    return {name: float(np.mean(own)) for name, own in groups.items()}


def carried(model: nn.Module, batch: Batch, chain: Sequence[str], skips: Sequence[Pair]) -> Values:
    """Mean shares by distance along the chain."""
    model, batch = in_double(model, batch)
    shares: dict[str, list[float]] = {}
    for v, w in skips:
        cut = cut_edges(model, batch, v, w, [(v, w)], points=list(chain))
        shares.setdefault(f"carried {chain.index(w) - chain.index(v)}", []).append(cut.share)
    return {name: float(np.mean(own)) for name, own in shares.items()}


def cases(full: bool) -> list[Case]:
    """Both architectures, with skips and without."""
    recipe = Recipe(EPOCHS if full else QUICK_EPOCHS, RATE, decay=0.0, batch=64, adam=True)
    data = {"densenet": classified(), "unet": noisy()}
    builds = {"densenet": DenseNet, "unet": UNet}
    return [
        Case(f"{name}/{kind}", partial(build, skip), measure, SAMPLES, recipe, data[name])
        for name, build in builds.items()
        for kind, skip in (("skips", True), ("chain", False))
    ]


def distances(found: Findings, network: str, kind: str) -> list[int]:
    """Along the chain, at which there are pairs with a skip (``"skip"``) or without (``"none"``)."""
    return [d for d in range(2, 16) if found.ours.stat(f"{network}/skips", "init", f"C {kind} {d}")]


def tables(found: Findings) -> list[Table]:
    """C̄, R̄ and what skips carry, by distance."""
    made = []
    for network, title in NETWORKS.items():
        own = found.cases(f"{network}/*")
        for letter, text in (("C", "C̄"), ("R", "R̄")):
            names = [f"{letter} {kind} {d}" for d in range(2, 16) for kind in ("skip", "none")]
            note = "skip: pairs that a skip joins, or would in the network without; none: all others."
            made.append(found.table(f"{title}: {text} by distance along the chain", own, names, None, note, None))
        names = [*(f"carried {d}" for d in range(2, 16)), "R sum", "T", "loss"]
        made.append(found.table(f"{title}: what skips carry, ΣR and the loss", own, names, None, "", None))
    return made


def claims(found: Findings) -> list[Claim]:
    """Both remarks, at initialization and after training."""
    made = []
    for network, when in itertools.product(NETWORKS, ("init", "final")):
        made += [_beside(found, network, when, letter) for letter in LETTERS]
        made += [_without(found, network, when, letter) for letter in LETTERS]
        if network == "densenet":
            made.append(_sum(found, when))
    return made


def _verdict(text: str, pairs: list[tuple[str, float, float]]) -> Claim:
    """Whether the first is larger in all: a label and two means each."""
    shown = ", ".join(f"{label}: {a:.3g} and {b:.3g}" for label, a, b in pairs)
    return Claim(text, shown or "–", all(a > b for _, a, b in pairs) if pairs else None)


def _mean(found: Findings, case: str, when: str, quantity: str) -> float:
    stat = found.ours.stat(case, when, quantity)
    return stat.mean if stat else float("nan")


def _beside(found: Findings, network: str, when: str, letter: str) -> Claim:
    text = f"{NETWORKS[network]}, {when}: {letter}̄ of pairs with a skip is larger than of those as far apart without"
    case, both = f"{network}/skips", set(distances(found, network, "skip")) & set(distances(found, network, "none"))
    names = [(d, [f"{letter} {kind} {d}" for kind in ("skip", "none")]) for d in sorted(both)]
    known = found.ours.stat(case, when, "R sum")
    return _verdict(text, [(f"d = {d}", *(_mean(found, case, when, n) for n in own)) for d, own in names if known])  # type: ignore[misc]


def _without(found: Findings, network: str, when: str, letter: str) -> Claim:
    text = f"{NETWORKS[network]}, {when}: {letter}̄ of pairs with a skip is larger than of the same in the plain chain"
    own = [f"{network}/{kind}" for kind in ("skips", "chain")]
    known = all(found.ours.stat(case, when, "R sum") for case in own)
    spans = distances(found, network, "skip") if known else []
    pairs = [(f"d = {d}", *(_mean(found, case, when, f"{letter} skip {d}") for case in own)) for d in spans]
    return _verdict(text, pairs)  # type: ignore[arg-type]


def _sum(found: Findings, when: str) -> Claim:
    own = [found.ours.stat(f"densenet/{kind}", when, "R sum") for kind in ("skips", "chain")]
    pairs = [("ΣR", own[0].mean, own[1].mean)] if own[0] and own[1] else []
    return _verdict(f"DenseNet, {when}: ΣR over all pairs is larger than in the plain chain (Remark 74)", pairs)


def figures(found: Findings) -> dict[str, Any]:
    """C̄ over distance, with skips and without, and what skips carry."""
    panels = []
    for network, title in NETWORKS.items():
        for when in ("init", "final"):
            curves: list[Curve] = []
            for case, kind, label, style in (
                ("skips", "skip", "joined by a skip", "-"),
                ("skips", "none", "not joined", "-"),
                ("chain", "skip", "the joined ones, in the chain", ":"),
            ):
                curves.append(over_distance(found, f"{network}/{case}", when, f"C {kind}", label, style))
            panels.append(Panel(f"{title}, {when}", curves, "distance along the chain", "C̄", log=False))
    curves = [
        over_distance(found, f"{network}/skips", when, "carried", f"{title}, {when}", style)
        for network, title in NETWORKS.items()
        for when, style in (("init", "-"), ("final", ":"))
    ]
    panels.append(Panel("carried by the skip", curves, "distance along the chain", "share of the block", log=False))
    return {"skips": draw(panels)}


EXPERIMENT = Experiment(
    name="skips",
    title="Skips: coupling in a DenseNet and a U-Net",
    section="Beyond the paper (Remarks 36 and 74)",
    data=classified,
    cases=cases,
    quick="2 seeds instead of 5, 4 epochs instead of 20.",
    tables=tables,
    claims=claims,
    figures=figures,
    paper=False,
)
