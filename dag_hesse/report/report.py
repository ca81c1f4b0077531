"""The report: n×n maps of the points, how each number was obtained, and blocks on demand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dag_hesse.errors import PointError, choose, position
from dag_hesse.estimate import METRICS
from dag_hesse.ir import Point
from dag_hesse.report.blocks import BlockReader, present
from dag_hesse.report.pairs import data_frame, pair_of, rows_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from dag_hesse.report.compare import Comparison
    from dag_hesse.storage import BlockMatrix
    from dag_hesse.theory import BlockSpectra

Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class CurvatureReport:
    """A curvature map over n points (design §5).

    Attributes:
        points: the points, in topological order; they label both axes of every array.
        values: n×n float64 arrays by metric name (also as attributes: ``resonance``, ``coupling``, …).
        stderr: their standard errors, 0.0 where exact.
        method: how each number was obtained: ``"exact"``, ``"gram"``, ``"probes"`` or ``"zero"`` (structurally).
        distance: points passed on the way between two points; -1 if they never meet.
        rank_bound: per-sample bound on the rank of the GN part.
        facts: loss value, batch size and mode, space, options, opaque ops, sweeps, seconds by stage.
    """

    points: tuple[Point, ...]
    values: Mapping[str, Array]
    stderr: Mapping[str, Array]
    method: Mapping[str, NDArray[np.str_]]
    distance: NDArray[np.int64]
    rank_bound: NDArray[np.int64]
    facts: Mapping[str, Any]
    _reader: BlockReader | None = field(default=None, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points: labels of both axes."""
        return tuple(point.name for point in self.points)

    def __len__(self) -> int:
        """How many points there are."""
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        """The points, in order."""
        return iter(self.points)

    def __contains__(self, point: object) -> bool:
        """Whether a name or a :class:`~dag_hesse.Point` is among the points."""
        return point in self.names or point in self.points

    def __getitem__(self, key: Any) -> Any:
        """``report["resonance"]``: an n×n array; ``report[v, w]``: a pair's figures, by names or positions.

        Raises:
            OptionError: there is no such metric.
            PointError: there is no such point.

        Examples:
            >>> import torch, dag_hesse
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> report = dag_hesse.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
            >>> pair = report["0", "1"]
            >>> pair.distance, pair.resonance.method, float(pair.resonance) == float(report["resonance"][0, 1])
            (1, 'exact', True)
        """
        if not isinstance(key, tuple):
            choose("metric", key, METRICS)
            return self.values[key]
        if len(key) != 2:
            raise PointError(f"report[v, w] names two points; received {len(key)}.")
        return pair_of(self, *map(self.index, key))

    @property
    def resonance(self) -> Array:
        """R(v, w) = ‖H[v, w]‖_F (Definition 23)."""
        return self.values["resonance"]

    @property
    def coupling(self) -> Array:
        """C(v, w) = R(v, w)/√(R(v, v) R(w, w)) (Definition 23); may exceed 1."""
        return self.values["coupling"]

    @property
    def stable_rank(self) -> Array:
        """D(v, w) = ‖H‖_F²/‖H‖₂² (Definition 24); NaN where the block is zero."""
        return self.values["stable_rank"]

    @property
    def gn_gap(self) -> Array:
        """‖H_T‖_F/‖H_GN‖_F."""
        return self.values["gn_gap"]

    @property
    def gn_norm(self) -> Array:
        """‖H_GN‖_F."""
        return self.values["gn_norm"]

    @property
    def tensor_norm(self) -> Array:
        """‖H_T‖_F; exactly 0.0 where the structure proves it."""
        return self.values["tensor_norm"]

    @property
    def phi(self) -> float:
        """Φ = Σ_{v≠w} R²/Σ R²: what a preconditioner that is block-diagonal in these points discards (design §2.5).

        NaN where pairs were not asked for.
        """
        squares = self.resonance**2
        total = squares.sum()
        return float((total - np.trace(squares)) / total) if total else 0.0

    def index(self, point: str | int) -> int:
        """Position of a point given by name or position.

        Raises:
            PointError: no such point; near names are suggested.
        """
        return position(point, self.names, "this report")

    def block(self, v: str | int, w: str | int, part: str = "full") -> Tensor:
        """The exact block H[v, w], computed now.

        Args:
            v, w: points, by name or position.
            part: ``"full"``, ``"gn"`` or ``"tensor"``.

        Returns:
            ``shared``: (d_v, d_w); ``per_sample``: (batch, d_v, d_w); ``joint``: (batch·d_v, batch·d_w).

        Raises:
            PointError: there is no such point.
            StaleError: the report was loaded, unpickled or copied, or the model changed since.
        """
        choose("part", part, ("full", "gn", "tensor"))
        i, j = self.index(v), self.index(w)
        return present(self._reader)(i, j, part)

    def blocks(self, *, part: str = "full", parts: bool = False, **options: Any) -> BlockMatrix:
        """Store the blocks between the points, computed now; options as for :meth:`BlockMatrix.from_model`.

        Raises:
            StaleError: the report was loaded, unpickled or copied, or the model changed since.
            DagHesseError: as :meth:`BlockMatrix.from_model`; not in batch mode ``"per_sample"``.
        """
        return present(self._reader).matrix(part, parts, options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied without what makes blocks, which is the model and its batches."""
        maps = ({k: np.array(v) for k, v in each.items()} for each in (self.values, self.stderr, self.method))
        rest = (np.array(self.distance), np.array(self.rank_bound), copy.deepcopy(dict(self.facts)))
        return CurvatureReport, (self.points, *maps, *rest)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row per pair of points (v before w), and per metric its value, error and method.

        Raises:
            DependencyError: pandas is not installed.

        Examples:
            >>> import torch, dag_hesse
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> report = dag_hesse.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
            >>> report.to_dataframe()[["v", "w"]].values.tolist()
            [['0', '0'], ['0', '1'], ['1', '1']]
        """
        return data_frame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """What :meth:`to_dataframe` tabulates, as plain data."""
        return rows_of(self)

    def compare(self, other: CurvatureReport) -> Comparison:
        """What is different in another report of the same points, with differences in standard errors.

        Raises:
            OptionError: it is no report, or in another space or batch mode.
            PointError: the two have no point in common.

        Examples:
            >>> import torch, dag_hesse
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
            >>> report = dag_hesse.analyze(net, batch, points=["0", "1"])
            >>> report.compare(report).score["resonance"].tolist()
            [[0.0, 0.0], [0.0, 0.0]]
        """
        from dag_hesse.report.compare import compared

        return compared(self, other)

    def _repr_html_(self) -> str:
        """Facts and maps for notebooks."""
        from dag_hesse.report import html

        return html.fragment(self)

    def __repr__(self) -> str:
        names = ", ".join(self.names[:3]) + (", …" if len(self) > 3 else "")
        return f"CurvatureReport({len(self)} {self.facts['space']} points of {self.facts['model']}: {names})"

    def __str__(self) -> str:
        from dag_hesse.report.text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data (NaN as None)."""
        from dag_hesse.report.files import to_dict

        return to_dict(self)

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all."""
        from dag_hesse.report.files import write_json

        write_json(self, path)

    def save(self, path: str | Path) -> None:
        """Write the report as one safetensors file; :func:`dag_hesse.load` reads it back."""
        from dag_hesse.report.files import save

        save(self, path)

    def to_html(
        self, path: str | Path, *, against: CurvatureReport | None = None, spectra: BlockSpectra | None = None
    ) -> None:
        """Write one page that needs no network: linked maps, the graph of the points, decay, proofs, pairs, facts.

        Args:
            path: of the page, written whole or not at all.
            against: another report of the same points; the page can then show what is different there.
            spectra: of :func:`dag_hesse.theory.block_spectra`, to be drawn as well.

        Raises:
            OptionError: ``path`` is no name of a file, ``spectra`` are none, or the reports measure different things.
            PointError: the two reports have no point in common.

        Examples:
            >>> import tempfile, torch, dag_hesse
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> report = dag_hesse.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.to_html(f"{folder}/map.html")
            ...     open(f"{folder}/map.html", encoding="utf-8").read(15)
            '<!doctype html>'
        """
        from dag_hesse.report.html import write_html

        write_html(self, path, against, spectra)

    def plot(
        self,
        metrics: Sequence[str] = ("resonance", "coupling", "stable_rank", "gn_gap"),
        path: str | Path | None = None,
    ) -> Any:
        """Heat maps of the metrics and metric against distance, as a matplotlib Figure (extra: ``plot``).

        Args:
            metrics: what is drawn, a map each.
            path: where to save it, whole or not at all: ``.pdf`` and ``.svg`` are vectors, with text as text in a PDF.

        Raises:
            OptionError: there is no such metric, or no such kind of file.
            DependencyError: matplotlib is not installed.
        """
        from dag_hesse.report.plots import overview

        return overview(self, metrics, path)

    def to_model_explorer(
        self,
        path: str | Path,
        *,
        metric: str = "resonance",
        point: str | int | None = None,
        program: ExportedProgram | None = None,
    ) -> None:
        """Write a metric as node data (JSON) for Google's Model Explorer, which colours the nodes of a graph by it.

        Args:
            path: of the node data, as ``map.json``.
            metric: its name.
            point: its values are those of the pairs with this point; None: those of the diagonal.
            program: of ``torch.export.export(model, inputs)``: nodes are those of its graph, a point's being the one
                that computes a module's output or brings a parameter in. None: nodes are the points, and their graph is
                written as well, as ``map.graph.json``.

        Raises:
            OptionError: there is no such metric, or ``program`` is none.
            PointError: there is no such point, or the program has none of the report's.

        Examples:
            >>> import json, tempfile, torch, dag_hesse
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> report = dag_hesse.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.to_model_explorer(f"{folder}/map.json")
            ...     sorted(json.load(open(f"{folder}/map.json"))["results"])
            ['0', '1']
        """
        from dag_hesse.report.explorer import write_model_explorer

        write_model_explorer(self, path, metric, point, program)
