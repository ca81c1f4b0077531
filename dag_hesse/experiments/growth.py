"""Beyond the paper: growth of the Hessian blocks of attention with the scale of its input, and the gap of every head.

Exponents of all nine blocks of W_Q, W_K and W_V, per part, beside what counting powers gives, which the module
``scales`` derives, without LayerNorm and with it. Ormaniec et al. (ICLR 2025, "What does it mean to be a Transformer?
Insights from a theoretical Hessian analysis") give 6 and 5 within W_Q and W_K, and 2 and 0 within W_V.

The paper's Experiment 5 has one head of one layer, and Example 37(iii) says that heads need nothing new: here is the
gap ‖H_T‖/‖H_GN‖ of (Q, K) for each head of a GPT-2 of four layers, before and after it has learnt to repeat what it
read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dag_hesse.experiments.drawing import Curve, Panel, draw
from dag_hesse.experiments.gpt import GPT, repeats
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Row, Table
from dag_hesse.experiments.results import Stat
from dag_hesse.experiments.scales import BLOCKS, PARTS, RANGES, SCALES, Layer, counted, exponents, head_gaps, noise
from dag_hesse.experiments.training import Recipe

ORMANIEC = {"GN": {"QQ": "6", "KK": "6", "VV": "2"}, "T": {"QQ": "5", "KK": "5", "VV": "0"}}
CASES = {"plain": "without LayerNorm", "layernorm": "with LayerNorm, ε = 1e-5"}
GPT_WIDTH, HEADS, LAYERS = 64, 4, 4
WHEN = ("init", "final")


def cases(full: bool) -> list[Case]:
    """The layer with and without LayerNorm, and the GPT-2."""
    data, still = noise(), Recipe(0)
    layers = [Case(name, partial(Layer, name == "layernorm"), exponents, 16, still, data) for name in CASES]
    recipe = Recipe(2 if full else 1, 3e-3, decay=0.0, batch=64, adam=True)
    return [*layers, Case("gpt", partial(GPT, GPT_WIDTH, HEADS, LAYERS), head_gaps, 8 if full else 1, recipe)]


def _places() -> list[str]:
    """Of all heads, as layer.head."""
    return [f"{layer}.{head}" for layer in range(LAYERS) for head in range(HEADS)]


def _counted(case: str, where: str, part: str, name: str) -> float | None:
    """The exponent expected; None: the block is zero, or nothing is expected."""
    return None if (case, where) == ("plain", "large") else counted(part, name, flat=where == "large")


def _row(found: Findings, case: str, where: str, part: str, name: str) -> Row:
    own, expected = found.ours.stat(case, "init", f"{part} {name} {where}"), _counted(case, where, part, name)
    zeros = {v for s in SCALES for v in found.ours.values(case, "init", f"{part} {name} @{s:.3g}")} == {0.0}
    labels = (f"{name[0]}–{name[1]}", "H_GN" if part == "GN" else "H_T", ORMANIEC[part].get(name, "–"))
    return Row(labels, Stat(0.0, 0.0) if zeros else own, None if expected is None else Stat(expected, None))


def tables(found: Findings) -> list[Table]:
    """Exponents of all nine blocks, and the gap of every head."""
    made = []
    note = "exactly 0: the block is zero at every scale, by proof from the graph, and has no exponent."
    for case, text in CASES.items():
        for where, (low, high) in RANGES.items():
            rows = tuple(_row(found, case, where, p, name) for p in PARTS for name in BLOCKS if case in found.cases())
            title = f"Growth exponents {text}, scales {low:g} to {high:g}"
            made.append(Table(title, ("block", "part", "Ormaniec et al."), rows, note, "by counting"))
    rows = tuple(
        Row((place, when, name), own, None)
        for place in _places()
        for when in found.ours.checkpoints
        for name in ("gap", "T", "GN")
        if (own := found.ours.stat("gpt", when, f"{name} {place}"))
    )
    return [*made, Table("(Q, K) of every layer.head", ("layer.head", "when", "quantity"), rows, against=None)]


def claims(found: Findings) -> list[Claim]:
    """Whether exponents, rounded, are those counted, and what the heads show."""
    return [
        *(_as_counted(found, case, where) for case in CASES for where in RANGES if (case, where) != ("plain", "large")),
        _zero(found),
        *_heads(found),
    ]


def _as_counted(found: Findings, case: str, where: str) -> Claim:
    pairs = [
        (value, expected)
        for part in PARTS
        for name in BLOCKS
        if (expected := _counted(case, where, part, name)) is not None
        for value in found.ours.values(case, "init", f"{part} {name} {where}")
    ]
    furthest = max((abs(value - expected) for value, expected in pairs), default=0.0)
    low, high = RANGES[where]
    text = f"{CASES[case]}, scales {low:g} to {high:g}: exponents, rounded, are those counted, all blocks and seeds"
    held = all(round(value) == expected for value, expected in pairs) if pairs else None
    return Claim(text, f"{len(pairs)} exponents, at most {furthest:.2g} away" if pairs else "–", held)


def _zero(found: Findings) -> Claim:
    values = [v for case in CASES for s in SCALES for v in found.ours.values(case, "init", f"T VV @{s:.3g}")]
    text = "H_T = 0 within W_V, at every scale, with and without LayerNorm"
    return Claim(
        text, f"largest {max(values):g} of {len(values)}" if values else "–", not any(values) if values else None
    )


def _heads(found: Findings) -> list[Claim]:
    by = {when: [v for p in _places() for v in found.ours.values("gpt", when, f"gap {p}")] for when in WHEN}
    fallen = [b < a for a, b in zip(by["init"], by["final"], strict=False)]
    made = []
    for when, gaps in by.items():
        more = sum(gap > 1 for gap in gaps)
        shown = f"{more} of {len(gaps)}; {min(gaps):.3g} to {max(gaps):.3g}" if gaps else "–"
        text = f"‖H_T‖ > ‖H_GN‖ for (Q, K) of every head at {when}, all seeds"
        made.append(Claim(text, shown, more == len(gaps) if gaps else None))
    shown = f"{sum(fallen)} of {len(fallen)}" if fallen else "–"
    return [*made, Claim("training lowers the gap of every head, all seeds", shown, all(fallen) if fallen else None)]


def figures(found: Findings) -> dict[str, Any]:
    """Norms over the scale, without and with LayerNorm, and the gap of the heads."""
    shown = [
        ("GN", "QQ", "-"),
        ("T", "QQ", ":"),
        ("GN", "QK", "-"),
        ("T", "QK", ":"),
        ("GN", "VV", "-"),
        ("T", "QV", ":"),
    ]
    panels = []
    for case, text in CASES.items():
        curves = []
        for part, name, style in shown:
            norms = [found.ours.stat(case, "init", f"{part} {name} @{s:.3g}") for s in SCALES]
            curves.append(Curve(f"{part} {name[0]}–{name[1]}", SCALES, norms, [None] * len(SCALES), style))
        panels.append(Panel(text, curves, "scale of the input", "‖block‖_F", logx=True, base=10))
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    x = [layer + 0.15 * (head - (HEADS - 1) / 2) for layer, head in places]
    curves = [
        Curve(when, x, [found.ours.stat("gpt", when, f"gap {a}.{b}") for a, b in places], [None] * len(x), "")
        for when in found.ours.checkpoints
    ]
    panels.append(Panel("GN-gap of (Q, K), a point a head", curves, "layer of the GPT-2", "‖H_T‖/‖H_GN‖"))
    return {"growth": draw(panels)}


EXPERIMENT = Experiment(
    name="growth",
    title="Growth: blocks of attention by the scale of its input",
    section="Beyond the paper (Example 37, §7)",
    data=repeats,
    cases=cases,
    quick="2 seeds instead of 5; the GPT-2's curvature on 1 sequence instead of 8, after 1 epoch instead of 2.",
    tables=tables,
    claims=claims,
    figures=figures,
    paper=False,
    remarks=(
        "Without LayerNorm, softmax saturates from scales of about 1 on, and exponents are no whole numbers.",
        "Weights as GPT-2 has them at first, of std 0.02, make small scores, where H_T of (Q, K) leads H_GN by far.",
    ),
)
