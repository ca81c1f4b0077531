"""The shared vocabulary: typed nodes, their kinds, and the graph they form."""

from dag_hesse.ir.graph import BatchAxis, CurvatureGraph, Interaction, Point
from dag_hesse.ir.node import Guard, Kind, Node, Ref, fill, refill
from dag_hesse.ir.printer import render, render_around
from dag_hesse.ir.verifier import verify

__all__ = [
    "BatchAxis",
    "CurvatureGraph",
    "Guard",
    "Interaction",
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
