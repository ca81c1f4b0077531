"""The diagonal contraction: sweeps of any elementwise node (design §3, fuse)."""

from dag_hesse.kernels.pointwise.naive import Coefficient, adjoint, curvature, tangent, times

__all__ = ["Coefficient", "adjoint", "curvature", "tangent", "times"]
