"""The loss's gradient at the points, from linearizations that sweeps use as well."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.sweep.embed import joined
from dag_hesse.sweep.kept import Linearizations
from dag_hesse.sweep.meaning import Meaning
from dag_hesse.sweep.product import pullback


def gradient(meaning: Meaning, kept: Linearizations) -> list[Tensor]:
    """Per point, (groups, dim): one first-order adjoint pass an entry, added or put side by side as products are."""
    found: list[list[Tensor]] = [[] for _ in meaning.points]
    for entry, lin in kept:
        node = entry.graph.nodes[entry.graph.loss]
        one = torch.ones(1, *node.shape, dtype=node.dtype, device=kept.batches.device)
        sites = {k for point in entry.points for k in point.sites}
        adjoints = pullback(lin, {entry.graph.loss: one}, sites, meaning.embedding)
        for k, (point, own) in enumerate(zip(entry.points, found, strict=True)):
            vector = joined(entry.graph, point, adjoints, one, meaning.embedding)[0]
            own.append(entry.scale * vector.to(meaning.dtype_of(k)))
    if meaning.separate_groups:
        return [torch.cat(own) for own in found]
    return [torch.stack(own).sum(0) for own in found]
