"""Two reports held against each other, in standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError, PointError, choose, kind_of
from dag_hesse.estimate import METRICS
from dag_hesse.report.pairs import data_frame, number

if TYPE_CHECKING:
    from dag_hesse.report.report import CurvatureReport

Array = NDArray[np.float64]
_SHOWN = 8  # pairs in the text


@dataclass(frozen=True)
class Comparison:
    """What changed from one report to another, over the points that both have.

    Attributes:
        names: of those points, in the first report's order; they label both axes of every array.
        before, after: n×n values by metric.
        difference: after − before, by metric.
        stderr: standard errors of the differences, the two reports' taken as independent (with the same ``seed`` and
            the same points probes are the same, and differences are known better than this says).
        score: difference / stderr, by metric: 0 where nothing changed, ±inf where both are exact and differ by more
            than rounding, NaN where one is undefined.
        missing: points that only one of the reports has.
    """

    names: tuple[str, ...]
    before: Mapping[str, Array]
    after: Mapping[str, Array]
    difference: Mapping[str, Array]
    stderr: Mapping[str, Array]
    score: Mapping[str, Array]
    missing: tuple[str, ...]

    def rows(self, metric: str = "resonance") -> list[dict[str, Any]]:
        """A row per pair of points, the largest \\|score\\| first, undefined ones last.

        Raises:
            OptionError: there is no such metric.
        """
        choose("metric", metric, METRICS)
        found: list[dict[str, Any]] = []
        for i, j in zip(*np.triu_indices(len(self.names)), strict=True):
            row: dict[str, Any] = {"v": self.names[i], "w": self.names[j]}
            for name in ("before", "after", "difference", "stderr", "score"):
                row[name] = float(getattr(self, name)[metric][i, j])
            found.append(row)
        return sorted(found, key=lambda row: -abs(row["score"]) if row["score"] == row["score"] else 1.0)

    def to_dataframe(self, metric: str = "resonance") -> Any:
        """:meth:`rows` as a pandas DataFrame.

        Raises:
            DependencyError: pandas is not installed.
        """
        return data_frame(self.rows(metric))

    def __str__(self) -> str:
        lines = ["pair: resonance before → after (difference in standard errors)"]
        for row in self.rows()[:_SHOWN]:
            numbers = " → ".join(number(row[name], 0.0, "exact") for name in ("before", "after"))
            lines.append(f"{row['v']} – {row['w']}: {numbers} ({row['score']:+.1f} σ)")
        if self.missing:
            lines.append(f"in one of the reports alone: {', '.join(self.missing)}")
        return "\n".join(lines)


def compared(before: CurvatureReport, after: Any) -> Comparison:
    """As :meth:`dag_hesse.CurvatureReport.compare`."""
    if not isinstance(after, type(before)):
        raise OptionError(f"a report is compared with {kind_of(after)}; expected a CurvatureReport.")
    for what in ("space", "batch_mode"):
        if before.facts[what] != after.facts[what]:
            raise OptionError(
                f"reports in {what} {before.facts[what]!r} and {after.facts[what]!r} measure different things: "
                f"analyze both with the same {what}=."
            )
    shapes = {point.name: point.shape for point in after.points}
    names = tuple(point.name for point in before.points if shapes.get(point.name) == point.shape)
    if not names:
        raise PointError(f"the reports have no point in common: {list(before.names)[:4]} and {list(after.names)[:4]}.")
    first, second = (np.ix_(*[[each.index(name) for name in names]] * 2) for each in (before, after))
    old = {name: before.values[name][first] for name in METRICS}
    new = {name: after.values[name][second] for name in METRICS}
    error = {name: np.hypot(before.stderr[name][first], after.stderr[name][second]) for name in METRICS}
    change = {name: new[name] - old[name] for name in METRICS}
    rounding = 1e-9 if {before.facts["dtype"], after.facts["dtype"]} == {"float64"} else 1e-4
    score = {name: _score(change[name], error[name], rounding * np.abs(old[name])) for name in METRICS}
    either = dict.fromkeys((*before.names, *after.names))
    return Comparison(names, old, new, change, error, score, tuple(name for name in either if name not in names))


def _score(change: Array, error: Array, rounding: Array) -> Array:
    """Differences in standard errors; what is exact on both sides has changed or has not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = change / error
        exact = np.where(np.abs(change) <= rounding, 0.0, np.sign(change) * np.inf)
    return np.where(np.isnan(change), np.nan, np.where(error > 0, ratio, exact))
