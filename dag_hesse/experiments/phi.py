"""Beyond the paper: Φ, what a block-diagonal preconditioner discards (Corollary 29), by architecture and size.

Φ = Σ_{v≠w}‖H[θ_v, θ_w]‖_F²/‖H‖_F² over the weights of linear and convolutional layers, which K-FAC has blocks for;
biases and BatchNorm are left out. It is taken of the Hessian (``phi``) and of its Gauss–Newton part (``phi GN``),
which for cross-entropy is the Fisher matrix that K-FAC approximates: K-FAC is off by √Φ or more.

Remark 36 says that residual networks have dense resonance, so that block-diagonal optimizers lose coupling there.
Three questions:

- ResNet-18 with skips and without, of the same weights, over the same 18 layers (those of the shortcuts left out);
- the same with 10, 30 and 100 classes, labels drawn at random for all three;
- GPT-2's shape of two layers, along its width.

Two things are known before measuring. The output of a ReLU network is linear in each of its weights, piece by piece,
if BatchNorm is in evaluation mode: H_T is exactly 0 on the diagonal, and all of it lies where no block-diagonal
preconditioner looks. And with one sample and one direction of the output, H_GN[v, w] = g_v g_wᵀ, whose coupling is 1
everywhere; with more directions, layers can differ, so that Φ of H_GN should fall with the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dag_hesse.experiments.data import CHANNELS, Data, digits, relabelled
from dag_hesse.experiments.drawing import Curve, Panel, draw
from dag_hesse.experiments.gpt import GPT, repeats
from dag_hesse.experiments.measure import Batch, Values, exact_map
from dag_hesse.experiments.mlps import ACTIVATIONS
from dag_hesse.experiments.models import BasicBlock, ResNet, resnet18
from dag_hesse.experiments.protocol import Case, Claim, Experiment, Findings, Table
from dag_hesse.experiments.training import Recipe, criterion

KINDS, CLASSES = ("residual", "plain"), (10, 30, 100)
QUICK_WIDTH, WIDTH = 2, 8
QUICK_LADDER, LADDER = (4, 8, 16), (16, 32, 64, 128)
HEADS, LAYERS, TOKENS, SAMPLES = 2, 2, 8, 4
PROBES = 256
QUANTITIES = ["phi", "kept", "phi GN", "kept GN", "T on", "T off", "error"]


def weights(model: nn.Module) -> list[str]:
    """Of linear and convolutional layers, shortcuts left out."""
    found = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [f"{name}.weight" for name in found if "downsample" not in name]


def measure(model: nn.Module, batch: Batch, mode: str = "exact") -> Values:
    """Shares of squared norms, exact, or estimated where ``mode`` is ``"auto"``.

    Returns:
        ``phi``, ``phi GN``: Φ of H and of H_GN; ``kept``, ``kept GN``: 1 − Φ, the diagonal's share, to all digits;
        ``T on``, ``T off``: ‖H_T‖² on the diagonal and beside it, in ‖H‖² (above 1 where H_GN cancels some of it);
        ``blocks``: how many there are on the diagonal; ``error``: if estimated, the largest relative standard error
        of a block's norm.
    """
    options: dict[str, Any] = {"space": "parameter", "mode": mode, "probes": PROBES, "loss": criterion}
    report = exact_map(model, batch, weights(model), **options)
    total, tensor = float((report.resonance**2).sum()), report.tensor_norm**2
    found = {
        "phi": report.phi,
        "kept": kept(report.resonance),
        "phi GN": 1 - kept(report.gn_norm),
        "kept GN": kept(report.gn_norm),
        "T on": float(np.trace(tensor)) / total,
        "T off": float(tensor.sum() - np.trace(tensor)) / total,
        "blocks": float(len(report)),
    }
    if mode != "exact":
        found["error"] = float((report.stderr["resonance"] / report.resonance.clip(min=1e-300)).max())
    return found


def kept(norms: NDArray[np.float64]) -> float:
    """Share of the squares that is on the diagonal."""
    return float((np.diag(norms) ** 2).sum() / (norms**2).sum())


def network(kind: str, width: int, classes: int) -> ResNet:
    """ResNet-18 with ReLU; without skips it has the weights that it has with them."""
    model = resnet18(classes, ACTIVATIONS["relu"], width=width)
    for block in model.modules():
        if isinstance(block, BasicBlock) and kind == "plain":
            block.skip, block.downsample = False, None
    return model


def data(folder: Path | None = None) -> Data:
    """Digits as images of CIFAR's size; a folder is not used."""
    return digits(CHANNELS)


def cases(full: bool) -> list[Case]:
    """Architecture by classes, and the ladder."""
    width, ladder, mode = (WIDTH, LADDER, "auto") if full else (QUICK_WIDTH, QUICK_LADDER, "exact")
    still, shares, pictures, sequences = Recipe(0), partial(measure, mode=mode), data(), repeats(tokens=TOKENS)
    networks = [
        Case(f"{kind}/{k}", partial(network, kind, width, k), shares, SAMPLES, still, relabelled(pictures, k))
        for k in CLASSES
        for kind in KINDS
    ]
    builds = {size: partial(GPT, size, HEADS, LAYERS, tokens=TOKENS) for size in ladder}
    return networks + [Case(f"gpt/{size}", build, shares, SAMPLES, still, sequences) for size, build in builds.items()]


def tables(found: Findings) -> list[Table]:
    """ResNets by classes, Transformers by width."""
    note = "phi = 1 − kept. T on, T off: share of ‖H_T‖² on the diagonal and beside it, in ‖H‖²."
    networks = [case for k in CLASSES for kind in KINDS for case in found.cases(f"{kind}/{k}")]
    return [
        found.table("ResNet-18, 18 weights, by classes", networks, QUANTITIES, None, note, None),
        found.table("GPT-2's shape by width", found.cases("gpt/*"), QUANTITIES, None, note, None),
    ]


def claims(found: Findings) -> list[Claim]:
    """What Remark 36 suggests, and what is known beforehand."""
    zeros = found.all([case for kind in KINDS for case in found.cases(f"{kind}/*")], "init", "T on")
    zero = Claim(
        "ReLU networks: H_T = 0 on the diagonal, all seeds",
        f"largest share {max(zeros):g} of {len(zeros)}" if zeros else "–",
        not any(zeros) if zeros else None,
    )
    return [_residual(found, "phi GN"), _residual(found, "phi"), zero, *(_falls(found, kind) for kind in KINDS)]


def _residual(found: Findings, quantity: str) -> Claim:
    """Whether skips leave more beside the diagonal, seed by seed."""
    part = "H_GN" if quantity.endswith("GN") else "H"
    pairs = [
        pair
        for k in CLASSES
        for pair in zip(*(found.ours.values(f"{kind}/{k}", "init", quantity) for kind in KINDS), strict=False)
    ]
    more = sum(a > b for a, b in pairs)
    text = f"Φ of {part} is larger with skips than without (Remark 36), all classes and seeds"
    means = " and ".join(f"{np.mean(values):.4f}" for values in zip(*pairs, strict=True))
    return Claim(
        text, f"{more} of {len(pairs)}; means {means}" if pairs else "–", more == len(pairs) if pairs else None
    )


def _falls(found: Findings, kind: str) -> Claim:
    stats = [found.ours.stat(f"{kind}/{k}", "init", "phi GN") for k in CLASSES]
    means = [stat.mean for stat in stats if stat]
    text = f"{kind}: Φ of H_GN falls with the number of classes (means over seeds)"
    known = len(means) == len(CLASSES)
    return Claim(text, " → ".join(f"{m:.4f}" for m in means), means == sorted(means)[::-1] if known else None)


def figures(found: Findings) -> dict[str, Any]:
    """The diagonal's share: of H and of H_GN, by classes and along the ladder."""
    panels = []
    for quantity, text in (("kept GN", "H_GN"), ("kept", "H")):
        curves = [_curve(found, kind, kind, CLASSES, quantity) for kind in KINDS]
        panels.append(Panel(f"ResNet-18: 1 − Φ of {text}", curves, "classes", "share on the diagonal"))
    sizes = [int(case.split("/")[1]) for case in found.cases("gpt/*")]
    curves = [_curve(found, text, "gpt", sizes, quantity) for quantity, text in (("kept GN", "H_GN"), ("kept", "H"))]
    panels.append(Panel("GPT-2's shape: 1 − Φ", curves, "width", "share on the diagonal", logx=True))
    return {"phi": draw(panels)}


def _curve(found: Findings, label: str, name: str, sizes: Sequence[int], quantity: str) -> Curve:
    stats = [found.ours.stat(f"{name}/{size}", "init", quantity) for size in sizes]
    return Curve(label, sizes, stats, [None] * len(stats))


EXPERIMENT = Experiment(
    name="phi",
    title="Φ: what a block-diagonal preconditioner discards",
    section="Beyond the paper (Corollary 29, Remark 36)",
    data=data,
    cases=cases,
    quick="2 seeds instead of 5; ResNet-18 of width 2 instead of 8, Transformers of width 4 to 16 instead of 16 to 128;"
    " all is exact at these sizes; the full protocol estimates H_T by probes.",
    tables=tables,
    claims=claims,
    figures=figures,
    paper=False,
)
