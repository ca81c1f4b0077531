"""Heads of a projection as points: ``"attn.q_proj[head 3]"`` is a slice of the module's output along its last axis."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from dag_hesse.errors import PointError
from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref
from dag_hesse.ir.rebuilt import rebuilt

_NAME = re.compile(r"(.+)\[head (\d+|\*)(?: of (\d+))?\]")
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "unflatten"})
_MOVES = _VIEWS | {
    "tap",
    "slice",
    "split",
    "split_with_sizes",
    "chunk",
    "narrow",
    "transpose",
    "permute",
    "clone",
    "alias",
}


def split_heads(graph: CurvatureGraph, names: Iterable[Any]) -> list[Any]:
    """Put a node for each head behind the outputs whose heads are named; the graph computes what it computed.

    Returns:
        The names, with those of all heads for ``[head *]``.

    Raises:
        PointError: there is no such output, it is called several times, or its heads cannot be told.
    """
    meant: list[Any] = []
    for name in names:
        found = _NAME.fullmatch(name) if isinstance(name, str) else None
        if found is None or name in graph.taps:
            meant.append(name)
            continue
        base, number = found[1], 0 if found[2] == "*" else int(found[2])
        site = _site(graph, base)
        count = _count(graph, base, site) if found[3] is None else int(found[3])
        width = graph.nodes[site].shape[-1]
        if count < 1 or width % count or number >= count:
            raise PointError(
                f"'{name}' is no head of '{base}', whose output has {width} columns and {count} heads: expected "
                f"[head 0] to [head {count - 1}]" + ("" if count and width % count == 0 else ", equally wide") + "."
            )
        suffix = "" if found[3] is None else f" of {count}"
        every = [f"{base}[head {k}{suffix}]" for k in range(count)]
        if every[0] not in graph.taps:
            _split(graph, site, every)
        meant += every if found[2] == "*" else [name]
    return meant


def _site(graph: CurvatureGraph, base: str) -> int:
    """The node of an output that is named once, or by its call."""
    name, _, call = base.partition("[")
    sites = graph.taps.get(base) or graph.taps.get(name, ())
    if base not in graph.taps and re.fullmatch(r"\d+\]", call) and int(call[:-1]) < len(sites):
        sites = (sites[int(call[:-1])],)
    if not sites or (base not in graph.taps and not call):
        raise PointError(f"heads of '{base}' are named, and there is no output of that name.")
    if len(sites) > 1:
        raise PointError(f"'{base}' is called {len(sites)} times: name one call, as '{base}[0][head 0]'.")
    batch_axis = graph.batch_axes[sites[0]] if graph.batch_axes else None
    if batch_axis is not None and batch_axis.axis == len(graph.nodes[sites[0]].shape) - 1:
        raise PointError(f"the last axis of '{base}' is that of the samples, so it has no heads.")
    if sites[0] in graph.out or sites[0] == graph.loss:
        raise PointError(f"'{base}' is what the loss consumes, and has no heads.")
    return sites[0]


def _count(graph: CurvatureGraph, base: str, site: int) -> int:
    """How many heads the forward makes of an output: by the first view that divides its last axis."""
    waiting = [site]
    while waiting:
        parent = graph.nodes[waiting.pop(0)]
        last = parent.shape[-1] if parent.shape else 1
        for k in graph.children[parent.index]:
            node = graph.nodes[k]
            op = node.op.split(".")[1] if "." in node.op else node.op
            if op not in _MOVES or node.kind is Kind.CONST or len(node.inputs) != 1:
                continue
            if op in _VIEWS and len(node.shape) > 1 and node.shape[-1] < last == node.shape[-1] * node.shape[-2]:
                return graph.nodes[site].shape[-1] // node.shape[-1]
            if node.shape and node.shape[-1] <= last and (op not in ("transpose", "permute") or node.shape[-1] == last):
                waiting.append(k)
    width = graph.nodes[site].shape[-1]
    raise PointError(
        f"the forward makes no heads of '{base}' that can be seen: say how many, as '{base}[head 0 of 4]' of its "
        f"{width} columns."
    )


def _split(graph: CurvatureGraph, site: int, names: list[str]) -> None:
    """Slices behind ``site``, and their concatenation in its place."""
    old, count = graph.nodes[site], len(names)
    width = old.shape[-1] // count
    nodes, origins, places, used = list[Node](), list[int](), dict[int, int](), dict[int, int]()

    def emit(node: Node, inputs: Iterable[int], origin: int) -> int:
        nodes.append(replace(node, index=len(nodes), inputs=tuple(inputs), taps=list(node.taps)))
        origins.append(origin)
        return len(nodes) - 1

    taps: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        places[node.index] = used[node.index] = emit(node, (used[k] for k in node.inputs), node.index)
        if node.index != site:
            continue
        moved = partial(replace, old, kwargs={}, kind=Kind.STRUCTURAL, output=None, name="", draws=False)
        cut, join = torch.ops.aten.slice.Tensor, torch.ops.aten.cat.default
        pieces = []
        for k, name in enumerate(names):
            args = (Ref(0), -1, k * width, (k + 1) * width)
            shape = (*old.shape[:-1], width)
            piece = moved(op=str(cut), target=cut, args=args, shape=shape, taps=[name])
            pieces.append(emit(piece, [places[site]], site))
            taps[name] = (pieces[-1],)
        whole = moved(op=str(join), target=join, args=([Ref(k) for k in range(count)], -1), taps=[])
        used[site] = emit(whole, pieces, site)
    found = rebuilt(graph, nodes, places, origins)
    found.taps |= taps
    for each in fields(CurvatureGraph):
        setattr(graph, each.name, getattr(found, each.name))
