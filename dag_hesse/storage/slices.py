"""The matrix of some of a stored matrix's points: nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dag_hesse.storage.build import Built
from dag_hesse.storage.cores import Cores, Pair

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix


def submatrix(matrix: BlockMatrix, points: list[int]) -> BlockMatrix:
    """The rows and columns of some points. Errors of the whole stay those of the whole matrix."""
    from dag_hesse.storage.matrix import BlockMatrix

    place = {k: number for number, k in enumerate(points)}

    def inside(table: Mapping[Pair, Any]) -> dict[Pair, Any]:
        return {(place[v], place[w]): x for (v, w), x in table.items() if v in place and w in place}

    cores = matrix.cores
    places = [matrix._places[k] for k in points]
    return BlockMatrix(
        matrix.form.among(points),
        Built(
            Cores([cores.dims[k] for k in points], cores.groups, [cores.bases[k] for k in points], inside(cores.cores)),
            inside(matrix.pairs),
            matrix.facts,
        ),
        None if matrix._live is None else matrix._live.among(places),
        {part: submatrix(each, points) for part, each in matrix._parts.items()},
        places,
    )
