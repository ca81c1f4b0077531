"""Linearize once, then sweep: tangents forward, adjoints back in two channels (design §3, linearize and sweep)."""

from dag_hesse.sweep.engine import Adjoint, pullback, sweep
from dag_hesse.sweep.linearize import Linearization
from dag_hesse.sweep.problem import Blocks, Problem, Request

__all__ = ["Adjoint", "Blocks", "Linearization", "Problem", "Request", "pullback", "sweep"]
