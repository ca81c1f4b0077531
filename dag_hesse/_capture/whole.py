"""Points that have no batch axis, though they depend on samples: they are perturbed as a whole."""

from __future__ import annotations

from dag_hesse.ir import CurvatureGraph, Point

LOST = "the batch axis is lost at"
MIXED = "samples are mixed at"  # added up, contracted or moved into one another: there is no axis to follow


def whole_points(graph: CurvatureGraph) -> dict[str, list[str]]:
    """Names of those points, by why and where their axis ends."""
    found: dict[str, list[str]] = {}
    for point in graph.points if graph.batch_size > 1 else ():
        if point.kind == "activation" and (why := _why(graph, point)):
            found.setdefault(why, []).append(point.name)
    return found


def whole_lines(graph: CurvatureGraph) -> list[str]:
    """The same in words."""
    lines = []
    for why, names in whole_points(graph).items():
        named = ", ".join(map(repr, names[:4])) + (" …" if len(names) > 4 else "")
        lines.append(f"{why}: {named} behind it {'is' if len(names) == 1 else 'are'} perturbed as a whole")
    return lines


def _why(graph: CurvatureGraph, point: Point) -> str:
    sites = [site for site in point.sites if graph.batch_axes[site] is None]
    if not sites:
        return ""
    ends = [graph.ends[site] for site in sites if graph.ends[site]]
    if ends or not graph.lost or any(graph.batch_axes[k] is not None or graph.ends[k] for k in graph.out):
        return ends[0] if ends else ""
    return f"{LOST} {graph.lost[0]}"  # by integers that the forward looked at: nothing seems to depend on samples
