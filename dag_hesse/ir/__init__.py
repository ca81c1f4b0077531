"""The shared vocabulary: typed nodes, their kinds, and the graph they form."""

from dag_hesse.ir.graph import BatchLayout, Coupling, CurvatureGraph, Point
from dag_hesse.ir.node import Guard, Kind, Node, Ref, fill, refill
from dag_hesse.ir.printer import render, render_around
from dag_hesse.ir.verifier import verify

__all__ = [
    "BatchLayout",
    "Coupling",
    "CurvatureGraph",
    "Guard",
    "Kind",
    "Node",
    "Point",
    "Ref",
    "fill",
    "refill",
    "render",
    "render_around",
    "verify",
]
