"""From a recording to the typed graph: what the loss consumes, and no more nodes than it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dag_hesse._capture.forward import OUTPUT
from dag_hesse._capture.record import LOSS_INPUT, Recording
from dag_hesse.errors import CaptureError, PointError, suggest
from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.ir.ops import TAP
from dag_hesse.rules.table import pairs_of, rule_for


def convert(recording: Recording, batch_size: int, output: str | None) -> CurvatureGraph:
    """Type the recording, find ``out``, and drop what the loss does not depend on.

    Raises:
        CaptureError: the loss depends on nothing.
        PointError: ``output`` names nothing.
    """
    trail = recording.trail
    graph = CurvatureGraph(
        nodes=trail.nodes,
        loss=recording.loss,
        out=(),
        batch_size=batch_size,
        parameters=trail.parameters,
        inputs=trail.inputs,
        constants=trail.constants,
        taps={name: tuple(sites) for name, sites in trail.taps.items()},
        modules=trail.modules,
        guards=tuple(trail.guards),
        batch_bound=trail.batch_bound,
        value=recording.value,
        written=tuple(recording.written),
        rng_before=recording.rng_before,
        rng_after=recording.rng_after,
    )
    if trail.nodes[recording.loss].kind is Kind.CONST:
        raise CaptureError("the loss does not depend on any parameter or module output: it has no derivative.")
    graph.out, graph.split = _find_out(graph, output)
    return _merged(_prune(graph))


def _tapped(graph: CurvatureGraph, sites: Iterable[int]) -> list[int]:
    """The nodes that are tapped (a tap is a node of its own)."""
    return [graph.nodes[k].inputs[0] if graph.nodes[k].op == TAP else k for k in sites]


def _find_out(graph: CurvatureGraph, output: str | None) -> tuple[tuple[int, ...], bool]:
    """The nodes that the loss consumes (design §2.2), and whether they are known.

    A tensor of the model's output counts where the loss uses it, not where the model uses it before it returns.
    """
    if output is not None:
        if output not in graph.taps:
            raise PointError(f"output={output!r} names no module or tap. {suggest(output, graph.taps)}")
        return tuple(dict.fromkeys(graph.taps[output])), True
    reaches = graph.ancestors([graph.loss])
    used = [site for name, sites in graph.taps.items() if name.startswith(OUTPUT) for site in sites if reaches[site]]
    found = [site for site in used if graph.nodes[site].numel > 1 or not _is_the_loss(graph, site)]
    if len(found) < len(used) or not used:  # the model computed its own loss
        logits = [k for k in _tapped(graph, graph.taps.get(f"{OUTPUT}.logits", ())) if reaches[k]]
        found += logits or [k for k in graph.taps.get(LOSS_INPUT, ()) if reaches[k]]
    return (tuple(dict.fromkeys(found)), True) if found else ((graph.loss,), False)


def _is_the_loss(graph: CurvatureGraph, site: int) -> bool:
    """Whether a node goes into the loss by sums and products with numbers alone."""
    linear = {site}
    for node in graph.nodes[site + 1 :]:
        if linear.intersection(node.inputs):
            if node.numel > 1 or not _is_linear(node, [k in linear for k in node.inputs]):
                return False
            linear.add(node.index)
    return graph.loss in linear


def _is_linear(node: Node, on: Sequence[bool]) -> bool:
    """Whether an op is linear in those of its inputs jointly."""
    if not node.is_differentiable or node.kind is Kind.OPAQUE:
        return False
    if node.kind is Kind.PIECEWISE_LINEAR:
        return rule_for(node).linear
    return not any(on[p] and on[q] for p, q in pairs_of(node))


def _prune(graph: CurvatureGraph) -> CurvatureGraph:
    """Drop nodes that the loss does not depend on. Looked-at values stay, and so do random draws."""
    needed = [node.draws for node in graph.nodes]
    for k in (graph.loss, *(guard.node for guard in graph.guards)):
        needed[k] = True
    for node in reversed(graph.nodes):
        if needed[node.index]:
            for parent in node.inputs:
                needed[parent] = True
    nodes = [node for node in graph.nodes if needed[node.index]]
    taps = {
        name.replace(OUTPUT, "output"): tuple(k for k in sites if needed[k])
        for name, sites in sorted(graph.taps.items(), key=lambda item: item[0].startswith(OUTPUT))
        if name != LOSS_INPUT and not (name.startswith(OUTPUT) and name.replace(OUTPUT, "output") in graph.taps)
    }
    pruned = replace(
        graph,
        taps={name: sites for name, sites in taps.items() if sites},
        unused=frozenset(name for name, sites in taps.items() if not sites),
        parameters={name: k for name, k in graph.parameters.items() if needed[k]},
        inputs={k: position for k, position in graph.inputs.items() if needed[k]},
        constants={k: tensor for k, tensor in graph.constants.items() if needed[k]},
    )
    return _numbered(pruned, nodes, {node.index: place for place, node in enumerate(nodes)})


def _merged(graph: CurvatureGraph) -> CurvatureGraph:
    """A tap needs no node of its own where the tapped tensor has no other child. Names are put on the nodes."""
    places: dict[int, int] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        tapped = graph.nodes[node.inputs[0]] if node.op == TAP else None
        alone = tapped is not None and graph.children[tapped.index] == [node.index]
        if tapped is not None and alone and tapped.is_differentiable and tapped.index not in graph.out:
            places[node.index] = places[tapped.index]
        else:
            places[node.index] = len(nodes)
            nodes.append(node)
    merged = _numbered(graph, nodes, places)
    for name, sites in merged.taps.items():
        for call, site in enumerate(sites):
            nodes[site].taps.append(name if len(sites) == 1 else f"{name}[{call}]")
    return merged


def _numbered(graph: CurvatureGraph, nodes: list[Node], places: Mapping[int, int]) -> CurvatureGraph:
    """The graph with these of its nodes, which take the numbers ``places[old]``."""
    for node in nodes:
        node.index, node.inputs = places[node.index], tuple(places[k] for k in node.inputs)
    return replace(
        graph,
        nodes=nodes,
        loss=places[graph.loss],
        out=tuple(dict.fromkeys(places[k] for k in graph.out)),
        parameters={name: places[k] for name, k in graph.parameters.items()},
        inputs={places[k]: position for k, position in graph.inputs.items()},
        constants={places[k]: tensor for k, tensor in graph.constants.items()},
        taps={name: tuple(places[k] for k in sites) for name, sites in graph.taps.items()},
        guards=tuple(replace(guard, node=places[guard.node]) for guard in graph.guards),
        children=[],
    )
