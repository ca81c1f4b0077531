"""The points as a network whose edges are weighted by curvature."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from dag_hesse.errors import DependencyError, OptionError, choose
from dag_hesse.report import CurvatureReport
from dag_hesse.theory.scene import check_report

_METRICS = ("resonance", "coupling", "stable_rank", "gn_norm", "tensor_norm", "gn_gap")


def resonance_graph(report: CurvatureReport, metric: str = "coupling", threshold: float = 0.0) -> Any:
    """The resonance graph: a node per point, an edge per pair whose metric exceeds a threshold.

    Args:
        report: of :func:`dag_hesse.analyze`.
        metric: what weighs the edges.
        threshold: pairs at or below it have no edge.

    Returns:
        A ``networkx.Graph``. Nodes are the points' names, in order, with ``dim``, ``kind`` and ``resonance`` (R(v,v));
        edges have ``weight`` (the metric) and ``distance``.

    Raises:
        DependencyError: networkx is not installed.
        OptionError: unknown metric, or a threshold that is no number.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = dh.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
        >>> list(dh.theory.resonance_graph(report).edges)
        [('0', '1')]
    """
    check_report(report)
    choose("metric", metric, _METRICS)
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise OptionError(f"threshold={threshold!r}; expected a number.")
    try:
        import networkx
    except ImportError as error:
        raise DependencyError("resonance_graph() needs networkx: pip install 'dag-hesse[network]'.") from error
    graph, weights = networkx.Graph(metric=metric), report.values[metric]
    for point, own in zip(report.points, report.resonance.diagonal().tolist(), strict=True):
        graph.add_node(point.name, dim=point.dim, kind=point.kind, resonance=own)
    for v, w in zip(*(axis.tolist() for axis in np.triu_indices(len(report.points), 1)), strict=True):
        if weights[v, w] > threshold:
            weight, distance = float(weights[v, w]), int(report.distance[v, w])
            graph.add_edge(report.names[v], report.names[w], weight=weight, distance=distance)
    return graph
