"""What Gaussian probes that took no part in building say of an error's Frobenius norm.

E‖E z‖² = ‖E‖_F² for Gaussian z, and with p of them a mean that is far too small is unlikely. By Chernoff's bound,
P(mean ‖E z‖² ≤ a ‖E‖_F²) ≤ (a e^(1−a))^(p/2): the worst E has rank one. (Halko, Martinsson and Tropp 2011, §4.3, bound
the spectral norm by the same idea.)
"""

from __future__ import annotations

from math import e

from scipy.special import lambertw

PROBES = 16
RISK = 1e-6


def spread(probes: int = PROBES, risk: float = RISK) -> float:
    """f such that ‖E‖_F ≤ f · √(mean ‖E z‖²) but with probability ``risk``.

    >>> round(spread(16, 1e-6), 2), round(spread(64, 1e-6), 2)
    (3.77, 1.73)
    """
    a = -lambertw(-(risk ** (2 / probes)) / e).real
    return float(a) ** -0.5
