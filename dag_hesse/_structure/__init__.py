"""What is provable before any FLOP: zero blocks and tensor parts, rank bounds, interaction (design §3, structure)."""

from __future__ import annotations

from typing import Any

from torch import nn

from dag_hesse._capture import capture
from dag_hesse._structure.analysis import Structure, analyze_structure, curved_ops
from dag_hesse.ir import CurvatureGraph
from dag_hesse.options import checked_options


@checked_options(capture)
def structure(model: nn.Module | CurvatureGraph, batch: Any = None, **options: Any) -> Structure:
    """Say what is provably zero, how low GN ranks must be, and whether samples interact, before any FLOP.

    Args:
        model: a module (then ``batch`` and :func:`~dag_hesse.capture`'s options are taken), or a captured graph.
        batch: as for :func:`~dag_hesse.analyze`.

    Returns:
        A :class:`Structure`; ``print`` it.

    Examples:
        >>> import torch, dag_hesse
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> found = dag_hesse.structure(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
        >>> bool(found.tensor_alive.any())
        False
    """
    graph = model if isinstance(model, CurvatureGraph) else capture(model, batch, **options)
    return analyze_structure(graph)


__all__ = ["Structure", "analyze_structure", "curved_ops", "structure"]
