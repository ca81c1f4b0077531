"""Pictures of what a monitor has measured (matplotlib, an optional extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dag_hesse.errors import OptionError
from dag_hesse.figures import new_figure
from dag_hesse.monitor.changes import Change

Series = Sequence[tuple[int, float]]
# Title, names (or what they begin with), and a line to compare with.
PANELS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("loss", ("loss",), None),
    ("largest eigenvalue", ("sharpness", "preconditioned_sharpness"), None),
    ("step size over its edge", ("stability",), 1.0),
    ("curvature along the update", ("update", "update_gn", "update_tensor"), 0.0),
    ("GN-gap  ‖H$_T$‖ / ‖H$_{GN}$‖", ("gn_gap/",), None),
    ("resonance  R = ‖H‖$_F$", ("resonance/",), None),
)


def curves(history: Mapping[str, Series], prefix: str, changes: Sequence[Change] = ()) -> Any:
    """A figure with a panel for each kind of quantity; abrupt changes are ringed.

    Raises:
        OptionError: there is nothing to draw.
        DependencyError: matplotlib is not installed.
    """
    plain = {name[len(prefix) :]: series for name, series in history.items()}
    drawn = [(title, found, line) for title, names, line in PANELS if (found := _among(plain, names))]
    if not drawn:
        raise OptionError("nothing was measured yet: plot() draws what step() has returned.")
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = new_figure(figsize=(4.4 * columns, 3.0 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, (title, found, line) in zip(axes, drawn, strict=False):
        _panel(place, title, found, line, [c for c in changes if c.name[len(prefix) :] in found])
    for place in axes[len(drawn) :]:
        place.set_axis_off()
    return figure


def _among(plain: Mapping[str, Series], names: tuple[str, ...]) -> dict[str, Series]:
    return {k: v for k, v in plain.items() if k in names or any(n.endswith("/") and k.startswith(n) for n in names)}


def _panel(axes: Any, title: str, found: Mapping[str, Series], line: float | None, changes: Sequence[Change]) -> None:
    for name, series in found.items():
        axes.plot(*zip(*series, strict=True), "o-", ms=2, lw=1.2, label=name.rpartition("/")[2])
    values = [x for series in found.values() for _, x in series]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    if line is not None:
        axes.axhline(line, color="black", lw=0.8, ls="--")
    if changes:
        axes.plot([c.step for c in changes], [c.value for c in changes], "o", ms=9, mfc="none", color="red")
    axes.set_xlabel("step", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    if len(found) > 1:
        axes.legend(fontsize=7)
