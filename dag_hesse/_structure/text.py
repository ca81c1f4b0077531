"""Text of a structure: what is provably zero, and how wide the way out is."""

from __future__ import annotations

from dag_hesse._capture.whole import whole_lines
from dag_hesse._structure.analysis import Structure


def render(structure: Structure) -> str:
    """One line of facts, then one row a pair: H, H_T, rank bounds, distance."""
    graph, names = structure.graph, structure.names
    width = max(len(name) for name in names)
    alive = structure.alive
    zero_h, zero_t = int((~alive).sum()), int((~structure.tensor_alive).sum())
    first = structure.coupled
    lines = [
        f"{len(names)} points, {len(graph.nodes)} nodes, batch {graph.batch_size}",
        f"provably zero: {zero_h} of {len(names) ** 2} blocks, {zero_t} tensor parts",
        "samples: " + (f"interact, first at {first}" if first else "independent up to the loss"),
        *(f"batch axis lost at {where}" for where in graph.lost),
        *whole_lines(graph),
        "opaque ops: " + (", ".join(sorted({node.op for node in graph.opaque})) or "none"),
        "",
        f"{'v':<{width}}  {'w':<{width}}  {'H':>5} {'H_T':>5}  {'rank GN ≤':>10}  {'batch ≤':>8}  distance",
    ]
    for i, v in enumerate(names):
        for j in range(i, len(names)):
            lines.append(
                f"{v:<{width}}  {names[j]:<{width}}  {'alive' if alive[i, j] else 'zero':>5} "
                f"{'alive' if structure.tensor_alive[i, j] else 'zero':>5}  {structure.rank_bound[i, j]:>10}  "
                f"{structure.shared_rank_bound[i, j]:>8}  {structure.distance[i, j]:>8}"
            )
    return "\n".join(lines)
