"""Linearize once, then sweep: tangents forward, adjoints back in two channels (design §3, linearize and sweep)."""

from dag_hesse.sweep.engine import Adjoint
from dag_hesse.sweep.linearize import Linearization
from dag_hesse.sweep.parts import Parts, Request
from dag_hesse.sweep.problem import Problem
from dag_hesse.sweep.product import AnyLinearization, pullback, sweep
from dag_hesse.sweep.proof import VERIFY, capture_anew, prove_all

__all__ = [
    "VERIFY",
    "Adjoint",
    "AnyLinearization",
    "Linearization",
    "Parts",
    "Problem",
    "Request",
    "capture_anew",
    "prove_all",
    "pullback",
    "sweep",
]
