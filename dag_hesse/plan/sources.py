"""From which points pairs are swept, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dag_hesse._structure import Structure
from dag_hesse.plan.cost import Cost, path_cost
from dag_hesse.plan.data import SPECTRAL_STEPS, Method, Source
from dag_hesse.plan.task import Pair, Task


def sweep_cost(structure: Structure, source: int, reads: Iterable[int]) -> Cost:
    """Of one probe at point ``source``, read at points ``reads``: ahead once, back once or (with a T channel) twice."""
    graph = structure.graph
    ahead = path_cost(graph, graph.points[source].sites)
    back = path_cost(graph, [site for v in reads for site in graph.points[v].sites])
    return ahead + back * (2 if structure.tensor_alive[source].any() else 1)


def sources_of(task: Task, pairs: Iterable[Pair]) -> list[Source]:
    """A sweep per pair, from the end where it is exact with the fewest probes, else from the first."""
    reads: dict[tuple[int, Method], list[int]] = {}
    for v, w in pairs:
        ends = [k for k in (v, w) if task.cheap[k]]
        source = min(ends, key=lambda k: task.dims[k]) if ends else v
        reads.setdefault((source, Method.EXACT if ends else Method.PROBES), []).append(w if source == v else v)
    return [_source(task, k, method, targets) for (k, method), targets in sorted(reads.items())]


def _source(task: Task, point: int, method: Method, reads: Sequence[int]) -> Source:
    probes, once = task.dims[point] if method is Method.EXACT else task.probes, Cost()
    for n, structure in zip(task.counts, task.structures, strict=True):
        once = once + sweep_cost(structure, point, reads) * n
    return Source(point, method, probes, tuple(sorted(reads)), once.flops * probes, once.bytes * probes)


def spectral_cost(task: Task, sources: Iterable[Source]) -> Cost:
    """Of the spectral norms of sampled pairs, as a rule."""
    total, sampled = Cost(), [source for source in sources if source.method is Method.PROBES]
    for n, structure in zip(task.counts, task.structures, strict=True):
        single = [path_cost(structure.graph, point.sites) for point in structure.graph.points]
        for source in sampled:
            for v in source.reads:
                total = total + (single[source.point] + single[v]) * (2 * SPECTRAL_STEPS * n)
    return total
