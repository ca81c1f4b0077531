"""The diagonal contraction: sweeps of any elementwise node (design §3, fuse)."""

from dag_hesse.kernels.pointwise.naive import adjoint, curvature, tangent

__all__ = ["adjoint", "curvature", "tangent"]
