"""``python -m bench blocks [NAME …]``: what stored blocks take, how exact they are, and a product beside a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import dag_hesse as dh
from bench.timing import interleaved, median, write_json
from bench.workloads import WORKLOADS
from dag_hesse.budget import human
from dag_hesse.measure import measured
from dag_hesse.storage.text import needed

STAGES = [f"layer{k}.{j}" for k, count in enumerate((3, 4, 6, 3), 1) for j in range(count)]
LAYERS = ["stem", *(f"layer{k}.{j}" for k in (1, 2, 3, 4) for j in (0, 1)), "head"]
AGREED = 1e-3  # relative difference from sweeps, beyond the stated error, at which no time is printed


@dataclass(frozen=True)
class Case:
    """A workload, what is stored of it, and how."""

    workload: str
    space: str = "activation"
    points: Sequence[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "resnet18-relu": Case("ResNet-18 ReLU, B=32, 32²", options={"error": 0.01}),
    "resnet18-silu-gn": Case("ResNet-18 SiLU, B=32, 32²", options={"part": "gn", "error": 0.01}),
    "resnet18-silu": Case("ResNet-18 SiLU, B=32, 32²", options={"error": 0.01, "memory": "1GiB"}),
    "resnet18-layers": Case(
        "ResNet-18 ReLU, B=32, 32²", "parameter", LAYERS, {"band": 2, "memory": "2GiB", "rank": 24}
    ),
    "resnet50": Case(
        "ResNet-50, B=8, 224²", points=["stem", *STAGES], options={"part": "gn", "memory": "4GiB", "error": 0.01}
    ),
}
OPERATORS = {"full": dh.HessianOperator, "gn": dh.GGNOperator, "tensor": dh.TensorOperator}


def _product_times(matrix: dh.BlockMatrix, operator: Any) -> tuple[dict[str, float], float]:
    """Seconds of products, and how far the two are apart beside the matrix's own size."""
    z = torch.randn(operator.shape[0], 1)
    pieces = dict(zip(operator.names, z[:, 0].split(operator.form.sizes), strict=True))
    ordered = torch.cat([pieces[name] for name in matrix.names])
    swept = dict(zip(operator.names, (operator @ z[:, 0]).split(operator.form.sizes), strict=True))
    expected = torch.cat([swept[name] for name in matrix.names])
    off = float((matrix @ ordered - expected).norm() / expected.norm())
    many = ordered.unsqueeze(1).repeat(1, 16)
    runs: dict[str, Callable[[], Any]] = {
        "sweep": lambda: operator @ z[:, 0],
        "stored": lambda: matrix @ ordered,
        "stored, 16 at once": lambda: matrix @ many,
    }
    return {name: median(seconds) for name, seconds in interleaved(runs, 5).items()}, off


def _run(name: str, case: Case) -> dict[str, Any]:
    work = WORKLOADS[case.workload]()
    batch = (work.x, work.y)
    common: dict[str, Any] = {"loss": F.cross_entropy, "space": case.space, "points": case.points}
    with measured() as phase:
        matrix = dh.BlockMatrix.from_model(work.model, batch, progress=True, **common, **case.options)
    print(str(matrix).split("\n\n")[0])
    facts = matrix.facts
    operator = OPERATORS[facts["part"]](work.model, batch, **common)
    seconds, off = _product_times(matrix, operator)
    return {
        "case": name,
        "points": len(matrix.names),
        "rows": matrix.shape[0],
        "bytes": matrix.bytes,
        "peak_bytes": phase.peak_bytes,
        "build_seconds": phase.seconds,
        "sweeps": facts["sweeps"],
        "route": facts["route"],
        "error": facts["error"],
        "dropped": facts["dropped"] / facts["size"],
        "history": facts["history"],
        "needed": needed(facts["history"], case.options.get("error", 0.0)),
        "off": off,
        "agree": off <= 3 * (facts["error"] + facts["dropped"] / facts["size"]) + AGREED,
        "seconds": seconds,
        "phi_by_distance": _by_distance(matrix),
    } | (_beside(matrix, operator, work, case) if case.space == "parameter" else {})


def _beside(matrix: dh.BlockMatrix, operator: Any, work: Any, case: Case) -> dict[str, Any]:
    """Largest eigenvalues of what is stored beside the operator's, and Φ by distance from norms by sweeps."""
    report = dh.analyze(
        work.model,
        (work.x, work.y),
        loss=F.cross_entropy,
        space=case.space,
        points=case.points,
        stable_rank=False,
        progress=True,
    )
    squares: dict[int, float] = {}
    for d, norm in zip(report.distance.flatten().tolist(), report.resonance.flatten().tolist(), strict=True):
        squares[d] = squares.get(d, 0.0) + norm**2
    return {
        "eigenvalues": {"stored": matrix.eigsh(3)[0].tolist(), "operator": operator.eigsh(3)[0].tolist()},
        "phi_by_distance, of the operator": {d: x / sum(squares.values()) for d, x in sorted(squares.items())},
        "relative s.e. of the operator's norms, at most": float((report.stderr["resonance"] / report.resonance).max()),
    }


def _by_distance(matrix: dh.BlockMatrix) -> dict[int, float]:
    """Share of ‖H‖² that lies at each distance, dropped blocks as measured."""
    squares: dict[int, float] = {}
    for (v, w), facts in matrix.pairs.items():
        squares[facts.distance] = squares.get(facts.distance, 0.0) + (1 if v == w else 2) * facts.norm**2
    total = sum(squares.values()) or 1.0
    return {k: x / total for k, x in sorted(squares.items())}


def main(names: Sequence[str] = ()) -> int:
    """Measure, print and write; all cases, or those whose names contain one of ``names``."""
    table = Table("case", "points", "stored", "route", "sweeps", "build", "error", "dropped", "B @ z", "16 at once")
    rows = []
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        torch.manual_seed(0)
        row = _run(name, case)
        rows.append(row)
        t = row["seconds"]
        faster = [f"{t['sweep'] / t['stored']:.1f}×", f"{16 * t['sweep'] / t['stored, 16 at once']:.1f}×"]
        times = [f"{row['build_seconds']:.0f} s", f"{row['error']:.2%}", f"≤ {row['dropped']:.2%}"]
        shown = faster if row["agree"] else ["differs", f"{row['off']:.1%}"]
        table.add_row(name, str(row["points"]), human(row["bytes"]), row["route"], str(row["sweeps"]), *times, *shown)
        write_json("-".join(["blocks", *names]), {"cases": rows})
    Console(width=140).print(table)
    return 0 if all(row["agree"] for row in rows) else 1
