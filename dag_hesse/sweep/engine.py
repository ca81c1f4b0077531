"""The sweep: (★) of design §2.1, as a tangent pass and a two-channel adjoint pass over linearized calls.

A second-order term raised by an op of the loss subgraph goes to the GN channel, one raised by a model op to the T
channel (design §2.2). The channels lie one behind the other along the probe axis, so that every product runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dag_hesse.ir import Node
from dag_hesse.kernels.arena import Arena, is_owned
from dag_hesse.rules.base import ALL, Residual
from dag_hesse.sweep.linearize import Linearization, as_recorded

Read = Callable[[int, Tensor], Tensor]


@dataclass(slots=True)
class Adjoint:
    """Adjoints of one node: GN, T, or both stacked along the probe axis (GN first).

    ``data`` is (probes, *node) or (2·probes, *node). ``owned`` says whether it may be written to.
    """

    data: Tensor
    gn: bool
    tensor: bool
    owned: bool = False

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """(GN, T), None for a channel that nothing has reached."""
        if self.gn and self.tensor:
            half = self.data.shape[0] // 2
            return self.data[:half], self.data[half:]
        return (self.data, None) if self.gn else (None, self.data)

    def takes(self, gn: bool, tensor: bool) -> bool:
        """Whether terms of these channels can be added in place."""
        return self.owned and (self.gn, self.tensor) == (gn, tensor)

    def add(self, other: Adjoint, arena: Arena) -> Adjoint:
        """Return the sum, in place where one of the two is owned."""
        if (self.gn, self.tensor) == (other.gn, other.tensor):
            for one, term in ((self, other), (other, self)):
                if one.takes(term.gn, term.tensor):
                    one.data.add_(term.data)
                    return one
            return Adjoint(_sum(arena, self.data, other.data), self.gn, self.tensor, owned=True)
        wide, narrow = (self, other) if self.gn and self.tensor else (other, self)
        if not (wide.gn and wide.tensor):
            first, second = (wide, narrow) if wide.gn else (narrow, wide)
            return Adjoint(torch.cat([first.data, second.data]), True, True, owned=True)
        if not wide.owned:
            wide = Adjoint(wide.data.clone(), True, True, owned=True)
        half = wide.data.shape[0] // 2
        (wide.data[:half] if narrow.gn else wide.data[half:]).add_(narrow.data)
        return wide


def _sum(arena: Arena, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, out=arena.room(x, y))


def _push(lin: Linearization, seeds: Mapping[int, Tensor], needed: list[bool], parts: str) -> dict[int, Residual]:
    """Tangent pass; returns the residuals of second-order terms at inputs that are ``needed``, per node."""
    graph, tangents, residuals = lin.graph, dict(seeds), dict[int, Residual]()
    uses = [len(children) for children in graph.children]
    useful, wanted = lin.feeds[parts], lin.curved_in[parts]
    for node in graph.nodes[min(seeds, default=len(graph.nodes)) :]:
        call, onward = lin.calls.get(node.index), useful[node.index]
        given = {slot: tangents[k] for slot, k in enumerate(node.inputs) if k in tangents and lin.active[k]}
        curved = _slots(lin, node, needed) if node.index in wanted else []
        if call is not None and given and (onward or curved):
            moved, residual = call.push(given, onward, curved)
            if moved is not None:
                tangents[node.index] = _sum(lin.arena, moved, seeds[node.index]) if node.index in seeds else moved
            if residual is not None:
                residuals[node.index] = residual
        for k in set(node.inputs):
            uses[k] -= 1
            if uses[k] == 0:
                tangents.pop(k, None)
    return residuals


def _slots(lin: Linearization, node: Node, needed: list[bool]) -> list[int]:
    """Inputs of a node that its adjoints go on to."""
    return [slot for slot, k in enumerate(node.inputs) if lin.active[k] and needed[k]]


def _widened(adjoint: Adjoint | None, to_gn: bool) -> tuple[Adjoint | None, slice]:
    """The adjoint with room for a term of one channel, and the rows that this channel takes."""
    if adjoint is None or (adjoint.gn, adjoint.tensor) == (to_gn, not to_gn):
        return adjoint, slice(None)
    if not (adjoint.gn and adjoint.tensor):
        empty = torch.zeros_like(adjoint.data)
        halves = [empty, adjoint.data] if to_gn else [adjoint.data, empty]
        adjoint = Adjoint(torch.cat(halves), True, True, owned=True)
    half = len(adjoint.data) // 2
    return adjoint, slice(0, half) if to_gn else slice(half, None)


def _pull(
    lin: Linearization,
    given: Mapping[int, Tensor],
    residuals: dict[int, Residual],
    reads: set[int],
    needed: list[bool],
    parts: str,
    read: Read,
) -> dict[int, Adjoint]:
    """Adjoint pass from the ``given`` adjoints (GN channel) and the residuals of a tangent pass, which it uses up."""
    adjoints = {k: Adjoint(x, gn=True, tensor=False) for k, x in given.items()}
    found: dict[int, Adjoint] = {}
    for node in reversed(lin.graph.nodes):
        mine, residual = adjoints.pop(node.index, None), residuals.pop(node.index, None)
        if mine is not None and lin.sample is not None and node.index in lin.graph.out:
            mine = Adjoint(lin.mask(node.index, mine.data), mine.gn, mine.tensor, owned=True)
        if mine is not None and node.index in reads:
            found[node.index] = Adjoint(read(node.index, mine.data), mine.gn, mine.tensor)
        call = lin.calls.get(node.index)
        if call is None or not needed[node.index] or (mine is None and residual is None):
            continue
        to_gn, rows = lin.in_loss[node.index] or parts == "full", ALL
        if residual is not None:
            mine, rows = _widened(mine, to_gn)
        abar = None if mine is None else mine.data
        gn, tensor = (to_gn, not to_gn) if mine is None else (mine.gn, mine.tensor)
        slots = _slots(lin, node, needed)
        into = {
            slot: have.data
            for slot in slots
            if (have := adjoints.get(node.inputs[slot])) is not None and have.takes(gn, tensor)
        }
        pulled = call.pull(abar, residual, rows, slots, into)
        theirs = [] if abar is None else [abar]
        own = {s: is_owned(x, *theirs, *(y for t, y in pulled.items() if t != s)) for s, x in pulled.items()}
        del mine, residual, abar, theirs  # nothing is held longer than it is wanted
        while pulled:
            slot, data = pulled.popitem()
            if data is into.get(slot):
                continue
            k, term = node.inputs[slot], Adjoint(data, gn, tensor, own[slot])
            del data
            adjoints[k] = adjoints[k].add(term, lin.arena) if k in adjoints else term
            del term
    return found


def whole(node: int, data: Tensor) -> Tensor:
    """All of an adjoint is kept."""
    return data


def sweep(
    lin: Linearization,
    seeds: Mapping[int, Tensor],
    reads: Iterable[int],
    parts: str = "both",
    read: Read = whole,
) -> dict[int, Adjoint]:
    """One Hessian product: perturb the nodes in ``seeds``, return the adjoints' change at ``reads``.

    Args:
        lin: the linearized graph.
        seeds: per node, its perturbation (probes, *node).
        reads: nodes to read.
        parts: ``"both"`` keeps GN and T apart, ``"full"`` adds them into the GN channel, ``"gn"`` and
            ``"tensor"`` compute one alone.
        read: ``(node, data) -> data``: what to keep of the adjoint of a read node, taken as soon as it is known.

    Returns:
        Per read node an :class:`Adjoint`; nodes that nothing reaches are missing (their product is zero).
    """
    reads = set(reads)
    needed = lin.graph.descendants(reads)
    with as_recorded(lin.device):
        return _pull(lin, {}, _push(lin, seeds, needed, parts), reads, needed, parts, read)


def pullback(
    lin: Linearization, given: Mapping[int, Tensor], reads: Iterable[int], read: Read = whole
) -> dict[int, Tensor]:
    """First-order adjoints Σ J[u←v]ᵀ ū at ``reads`` for the ``given`` ū, (probes, *node), at nodes u."""
    reads = set(reads)
    with as_recorded(lin.device):
        found = _pull(lin, given, {}, reads, lin.graph.descendants(reads), "both", read)
    return {k: adjoint.data for k, adjoint in found.items()}
