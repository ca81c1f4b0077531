"""Hessian, Gauss–Newton and tensor part as linear operators."""

from dag_hesse.operators.block import Block
from dag_hesse.operators.eigen import Eigenpair
from dag_hesse.operators.estimates import Estimate
from dag_hesse.operators.factor import Factor
from dag_hesse.operators.fisher import FisherOperator
from dag_hesse.operators.kinds import GGNOperator, HessianOperator, TensorOperator, hvp
from dag_hesse.operators.landscape import Landscape
from dag_hesse.operators.operator import CurvatureOperator
from dag_hesse.operators.solve import Solution

__all__ = [
    "Block",
    "CurvatureOperator",
    "Eigenpair",
    "Estimate",
    "Factor",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "Landscape",
    "Solution",
    "TensorOperator",
    "hvp",
]
