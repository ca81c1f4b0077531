"""Tangent and adjoint passes that may stop at points: Jacobians along all paths, or along those that pass no point."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.rules.base import ALL
from dag_hesse.sweep import Linearization
from dag_hesse.sweep.embed import to_tensor, to_vector

_ROWS = 64  # unit vectors pulled back together


def push(
    lin: Linearization, seeds: Mapping[int, Tensor], reads: Collection[int], stop: Collection[int] = ()
) -> dict[int, Tensor]:
    """Tangents Σ J[u←v] ẋ_v at ``reads``, (probes, *node); those that arrive at ``stop`` go no further."""
    tangents, found = dict(seeds), {k: x for k, x in seeds.items() if k in reads}
    onward = lin.graph.ancestors(reads)
    with torch.no_grad():
        for node in lin.graph.nodes[min(seeds) + 1 : max(reads) + 1]:
            call = lin.calls.get(node.index)
            given = {slot: tangents[k] for slot, k in enumerate(node.inputs) if k in tangents and lin.active[k]}
            if call is None or not given or not onward[node.index]:
                continue
            moved, _ = call.push(given, True, ())
            if moved is None:
                continue
            total = moved + seeds[node.index] if node.index in seeds else moved
            if node.index in reads:
                found[node.index] = total
            if node.index not in stop:
                tangents[node.index] = total
    return found


def pull(
    lin: Linearization, given: Mapping[int, Tensor], reads: Collection[int], stop: Collection[int] = ()
) -> dict[int, Tensor]:
    """Adjoints Σ J[u←v]ᵀ ū_u at ``reads``, (probes, *node); those that arrive at ``stop`` go no further."""
    adjoints, found = dict(given), dict[int, Tensor]()
    onward = lin.graph.descendants(reads)
    with torch.no_grad():
        for node in reversed(lin.graph.nodes[min(reads) : max(given) + 1]):
            mine, call = adjoints.pop(node.index, None), lin.calls.get(node.index)
            if mine is None:
                continue
            if node.index in reads:
                found[node.index] = mine
            if call is None or (node.index in stop and node.index not in given) or not onward[node.index]:
                continue
            slots = [slot for slot, k in enumerate(node.inputs) if lin.active[k] and onward[k]]
            for slot, term in call.pull(mine, None, ALL, slots, {}).items():
                k = node.inputs[slot]
                adjoints[k] = adjoints[k] + term if k in adjoints else term
    return found


def tensor_of(graph: CurvatureGraph, site: int, z: Tensor) -> Tensor:
    """Vectors (probes, samples, dim) as a tensor (probes, *node)."""
    return to_tensor(z, graph.nodes[site].shape, graph.batch_axes[site], "each")


def vector_of(graph: CurvatureGraph, site: int, x: Tensor) -> Tensor:
    """A tensor (probes, *node) as vectors (probes, samples, dim)."""
    return to_vector(x, graph.nodes[site].shape, graph.batch_axes[site], "each")


def dense_jacobians(
    lin: Linearization, samples: int, target: Point, sources: Iterable[Point], stop: Collection[int] = ()
) -> dict[str, Tensor]:
    """Per source v that ``target`` u is reached from, J[u←v] of every sample (samples, d_u, d_v), in float64."""
    graph, site, sources = lin.graph, target.sites[0], list(sources)
    like = graph.nodes[site]
    eye = torch.eye(target.dim, dtype=like.dtype, device=lin.loss.device)[:, None, :].expand(-1, samples, -1)
    rows: dict[str, list[Tensor]] = {}
    for piece in eye.split(_ROWS):
        found = pull(lin, {site: tensor_of(graph, site, piece)}, {v.sites[0] for v in sources}, stop)
        for v in sources:
            if v.sites[0] in found:
                rows.setdefault(v.name, []).append(vector_of(graph, v.sites[0], found[v.sites[0]]).double())
    return {name: torch.cat(pieces).transpose(0, 1) for name, pieces in rows.items()}
