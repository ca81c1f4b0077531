"""What a report holds to be zero by proof, and why, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dag_hesse.report.report import CurvatureReport

WHY = {
    "apart": "no op of model or loss depends on both points",
    "block": "the points meet in no op of model or loss that has a second derivative",
    "gn": "the points do not meet in the loss",
    "tensor": "the points meet in no op of the model that has a second derivative",
}


def proved(report: CurvatureReport) -> list[dict[str, str]]:
    """A row per claim: what is zero, of how many of the unordered pairs, and why.

    Examples:
        >>> import torch, dag_hesse
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> report = dag_hesse.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
        >>> [(row["what"], row["pairs"]) for row in proved(report)]
        [('H_T', '3 of 3')]
    """
    upper = np.triu_indices(len(report))
    zero = {name: report.method[name][upper] == "zero" for name in ("resonance", "gn_norm", "tensor_norm")}
    apart = zero["resonance"] & (report.distance[upper] < 0)
    block = zero["resonance"] & ~apart
    gn = zero["gn_norm"] & ~zero["resonance"]
    tensor = zero["tensor_norm"] & ~zero["resonance"]
    claims = (
        ("H", apart, WHY["apart"]),
        ("H", block, WHY["block"]),
        ("H_GN", gn, WHY["gn"]),
        ("H_T", tensor, _no_tensor_part(report.facts.get("curved ops"), bool(zero["tensor_norm"].all()))),
    )
    return [
        {"what": what, "pairs": f"{int(pairs.sum())} of {len(pairs)}", "why": why}
        for what, pairs, why in claims
        if pairs.any()
    ]


def _no_tensor_part(curved: Mapping[str, int] | None, everywhere: bool) -> str:
    if everywhere and curved == {}:
        return "every op of the model between points and output is linear or piecewise linear in them"
    if not curved:
        return WHY["tensor"]
    return f"{WHY['tensor']}; elsewhere there are {', '.join(f'{op} ×{count}' for op, count in curved.items())}"
