"""Hessian, Gauss–Newton and tensor part as linear operators."""

from dag_hesse.operators.block import Block
from dag_hesse.operators.fisher import FisherOperator
from dag_hesse.operators.operator import CurvatureOperator, GGNOperator, HessianOperator, TensorOperator, hvp

__all__ = ["Block", "CurvatureOperator", "FisherOperator", "GGNOperator", "HessianOperator", "TensorOperator", "hvp"]
