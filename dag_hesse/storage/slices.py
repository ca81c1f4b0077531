"""The matrix of some of a stored matrix's points: nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dag_hesse.errors import PointError, position
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.storage.build import Built
from dag_hesse.storage.cores import Cores, Pair

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix


def chosen(names: Sequence[str], patterns: Any) -> list[int]:
    """Numbers of the points that names, globs or positions stand for, in order.

    Raises:
        PointError: one stands for none.
    """
    if not isinstance(patterns, Sequence) or not patterns:
        raise PointError(f"{patterns!r}; expected B[v, w], or B[[…]] with names, globs or positions.")
    found = set[int]()
    for pattern in patterns:
        match = [k for k, name in enumerate(names) if isinstance(pattern, str) and fnmatchcase(name, pattern)]
        found |= set(match) if match else {position(pattern, names, "this matrix")}
    return sorted(found)


def submatrix(matrix: BlockMatrix, points: list[int]) -> BlockMatrix:
    """The rows and columns of some points. Errors of the whole stay those of the whole matrix."""
    from dag_hesse.storage.matrix import BlockMatrix

    place = {k: number for number, k in enumerate(points)}

    def inside(table: Mapping[Pair, Any]) -> dict[Pair, Any]:
        return {(place[v], place[w]): x for (v, w), x in table.items() if v in place and w in place}

    form, cores = matrix.form, matrix.cores
    names, shapes = tuple(form.names[k] for k in points), tuple(form.shapes[k] for k in points)
    dtypes = tuple(form.dtypes[k] for k in points) if form.dtypes else ()
    places = [matrix._places[k] for k in points]
    return BlockMatrix(
        VectorForm(names, shapes, form.dtype, form.device, dtypes),
        Built(
            Cores([cores.dims[k] for k in points], cores.groups, [cores.bases[k] for k in points], inside(cores.cores)),
            inside(matrix.pairs),
            matrix.facts,
        ),
        None if matrix._live is None else matrix._live.among(places),
        {part: submatrix(each, points) for part, each in matrix._parts.items()},
        places,
    )
