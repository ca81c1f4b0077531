"""The paper's statements, measured: Jacobians, bounds, decay, ranks, paths, negative curvature, K-FAC's error."""

from dag_hesse.theory.bounds import ResonanceBounds, resonance_bounds
from dag_hesse.theory.decay import DecayFit, decay_fit, interaction_radius
from dag_hesse.theory.jacobians import JacobianNorms, jacobian_norms
from dag_hesse.theory.kfac import BandError, band_errors
from dag_hesse.theory.network import resonance_graph

__all__ = [
    "BandError",
    "DecayFit",
    "JacobianNorms",
    "ResonanceBounds",
    "band_errors",
    "decay_fit",
    "interaction_radius",
    "jacobian_norms",
    "resonance_bounds",
    "resonance_graph",
]
