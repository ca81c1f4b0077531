"""The paper's statements, measured: Jacobians, bounds, decay, ranks, paths, negative curvature, K-FAC's error."""

from dag_hesse.theory.bounds import ResonanceBounds, resonance_bounds
from dag_hesse.theory.jacobians import JacobianNorms, jacobian_norms

__all__ = ["JacobianNorms", "ResonanceBounds", "jacobian_norms", "resonance_bounds"]
