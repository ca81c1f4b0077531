"""Colours of maps: viridis, which is even to the eye, in grey, and to those who confuse red and green."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STOPS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 "
    "fde725"
)  # evenly spaced
_DECADES = 20.0  # a factor between the largest value and the least, from which on logarithms are shown


def spread(values: NDArray[np.float64]) -> tuple[float, float, bool]:
    """The least and the largest positive value, and whether they are so far apart that logarithms are shown.

    >>> spread(np.array([0.0, 2.0, np.nan, 300.0])), spread(np.array([0.0, 2.0])), spread(np.array([0.0]))
    ((2.0, 300.0, True), (0.0, 2.0, False), (0.0, 1.0, False))
    """
    known = values[(values > 0) & np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0, False
    low, high = float(known.min()), float(known.max())
    return (low, high, True) if high > _DECADES * low else (0.0, high, False)


def colours(values: NDArray[np.float64]) -> list[str | None]:
    """Of a row of values; None where one is not positive.

    >>> colours(np.array([1.0, 0.0, 2.0, np.nan]))
    ['#21918c', None, '#fde725', None]
    """
    low, high, log = spread(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.log(values / low) / np.log(high / low) if log else values / high
    stops = np.array([[int(stop[k : k + 2], 16) for k in (0, 2, 4)] for stop in STOPS.split()])
    shown = [
        [np.interp(min(x, 1.0), np.linspace(0, 1, len(stops)), channel) for channel in stops.T] if v > 0 else None
        for x, v in zip(at.tolist(), values.tolist(), strict=True)
    ]
    return [None if rgb is None else "#" + "".join(f"{round(float(c)):02x}" for c in rgb) for rgb in shown]
