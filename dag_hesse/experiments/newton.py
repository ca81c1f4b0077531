"""What a preconditioner loses that knows no cross-layer blocks: damped Gauss–Newton steps by bandwidth (Corollary 29).

Two small networks on scikit-learn's digits. The step (G + λI)⁻¹ g is solved with the stored blocks of G within a band
of layers, by :meth:`dag_hesse.BlockMatrix.solve`, and compared with the step of the whole G by conjugate gradients, and
with that of K-FAC (curvlinops), which is block-diagonal and a Kronecker product in each block.

A band of a positive semi-definite matrix need not be one: where λ is less than what the band leaves out, a wide band
can be worse than the diagonal alone. The corollary bounds what is left out, not the step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn

from dag_hesse.experiments.digits import load_digits
from dag_hesse.files import write_text, write_whole
from dag_hesse.operators import GGNOperator
from dag_hesse.randomness import preserved
from dag_hesse.storage import BlockMatrix

DAMPINGS, SAMPLES, STEPS = (1e-2, 1e-1, 1.0), 60, 5


@dataclass(frozen=True)
class Step:
    """A step by one method: relative error against the whole G's, and the loss before and after it."""

    method: str
    damping: float
    error: float
    before: float
    after: float


def networks() -> dict[str, nn.Module]:
    """An MLP of five layers and a CNN of four, with smooth activations, in float64."""
    with preserved():
        torch.manual_seed(0)
        hidden = (layer for n in (64, 32, 32, 32) for layer in (nn.Linear(n, 32), nn.Tanh()))
        mlp = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
        cnn = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
    return {"MLP": mlp.double(), "CNN": cnn.double()}


def images() -> tuple[Tensor, Tensor]:
    """Digits of 8×8."""
    x, y = load_digits()
    return F.avg_pool2d(x[:SAMPLES, :1], 4).double(), y[:SAMPLES]


def _gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    found = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten() for g in found])


def whole_step(G: GGNOperator, g: Tensor, damping: float, start: Tensor) -> Tensor:
    """(G + λI)⁻¹ g by conjugate gradients on sweeps, from the stored blocks' solution, which is checked by that."""
    shifted = LinearOperator(G.shape, matvec=lambda z: (G @ z) + damping * z, dtype=np.float64)
    step, failed = cg(shifted, g.numpy(), start.numpy(), rtol=1e-8, maxiter=20)
    if failed:
        raise RuntimeError("the stored blocks' step is not that of the sweeps")
    return torch.from_numpy(step)


def stored(model: nn.Module, batch: tuple[Tensor, Tensor], band: int | None) -> BlockMatrix:
    """The blocks of G between layers that are at most ``band`` apart; None: all."""
    layers = [name for name, module in model.named_children() if list(module.parameters())]
    return BlockMatrix.from_model(model, batch, points=layers, space="parameter", part="gn", error=0.0, band=band)


def kfac_steps(model: nn.Module, batch: tuple[Tensor, Tensor], g: Tensor) -> list[Tensor]:
    """K-FAC's, one a damping; none where curvlinops is not installed."""
    try:
        from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator
    except ImportError:
        return []
    options: dict[str, Any] = {"fisher_type": FisherType.TYPE2, "check_deterministic": False}
    K = KFACLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], **options)
    return [KFACInverseLinearOperator(K, damping=damping, use_exact_damping=True) @ g for damping in DAMPINGS]


def after_step(model: nn.Module, batch: tuple[Tensor, Tensor], step: Tensor) -> float:
    """The loss where θ − step leads to; the model stays where it is."""
    moved: dict[str, Tensor] = dict(model.named_parameters())
    pieces = step.split([p.numel() for p in moved.values()])
    moved = {name: (p - d.view_as(p)).detach() for (name, p), d in zip(moved.items(), pieces, strict=True)}
    with torch.no_grad():
        return float(F.cross_entropy(torch.func.functional_call(model, moved, (batch[0],)), batch[1]))


def steps(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Step]:
    """Every bandwidth, K-FAC, and the whole, at every damping."""
    loss, g = _gradient(model, batch)
    count, G = sum(1 for module in model.children() if list(module.parameters())), GGNOperator(model, batch)
    found: dict[str, list[Tensor]] = {}
    for band in range(count):
        B = stored(model, batch, band)
        found[f"band {band}"] = [B.solve(g, damping=damping).x for damping in DAMPINGS]
    truths = [whole_step(G, g, *pair) for pair in zip(DAMPINGS, found[f"band {count - 1}"], strict=True)]
    found |= {"K-FAC": kfac_steps(model, batch, g), "whole": truths}
    return [
        Step(name, damping, float((x - truth).norm() / truth.norm()), loss, after_step(model, batch, x))
        for name, own in found.items()
        for damping, x, truth in zip(DAMPINGS, own, truths, strict=False)
    ]


def train(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """A few whole steps, each halved until the loss falls."""
    for _ in range(STEPS):
        loss, g = _gradient(model, batch)
        step: Tensor = stored(model, batch, None).solve(g, damping=DAMPINGS[1]).x
        while after_step(model, batch, step) >= loss:
            step = step / 2
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()).detach() - step, model.parameters()
        )


def draw(rows: dict[str, list[Step]], path: Path) -> None:
    """Error of the step by bandwidth, a panel a network and stage, a line a damping; K-FAC's as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rows), 3.2), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, rows.items(), strict=True):
        for damping in DAMPINGS:
            own = [step for step in found if step.damping == damping]
            banded = [step.error for step in own if step.method.startswith("band")][:-1]  # the last one is the whole
            (line,) = axes.semilogy(range(len(banded)), banded, "o-", label=f"λ = {damping:g}")
            for step in own:
                if step.method == "K-FAC":
                    axes.axhline(step.error, color=line.get_color(), linestyle="--", linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel("bandwidth")
        axes.set_xticks(range(len(banded)))
    panels[0].set_ylabel("error of the step (dashed: K-FAC)")
    panels[0].legend()
    write_whole(path, lambda place: figure.savefig(place, dpi=130))


def main(arguments: Sequence[str] = ()) -> None:
    """Print and write the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m dag_hesse.experiments newton", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("newton-report"), help="folder to write to (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    batch, rows, lines = (
        images(),
        dict[str, list[Step]](),
        ["network,stage,method,damping,error,loss before,loss after"],
    )
    table = Table(title=f"One damped Gauss–Newton step on {SAMPLES} digits", title_justify="left")
    for column in ("network", "stage", "blocks of G", "λ", "error of the step", "loss before", "after"):
        table.add_column(column, justify="left" if len(table.columns) < 3 else "right")
    for name, model in networks().items():
        for stage in ("init", f"{STEPS} steps"):
            if stage != "init":
                train(model, batch)
            rows[f"{name}, {stage}"] = found = steps(model, batch)
            for s in found:
                table.add_row(
                    name, stage, s.method, f"{s.damping:g}", f"{s.error:.2e}", f"{s.before:.3f}", f"{s.after:.3f}"
                )
                lines.append(f"{name},{stage},{s.method},{s.damping},{s.error},{s.before},{s.after}")
    Console().print(table)
    write_text(options.out / "newton.csv", "\n".join(lines) + "\n")
    draw(rows, options.out / "newton.png")
    print(f"Table and figure are in {options.out.resolve()}")
