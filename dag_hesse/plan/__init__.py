"""Which sweeps give the requested quantities at least cost: pure data, graph in, plan out (design §3, plan)."""

from dag_hesse.plan.cost import Cost, path_cost
from dag_hesse.plan.data import Method, Plan, Source
from dag_hesse.plan.edge_table import Edge, edges, render_edges
from dag_hesse.plan.fusion import fuse, fuse_all
from dag_hesse.plan.planner import plan

__all__ = [
    "Cost",
    "Edge",
    "Method",
    "Plan",
    "Source",
    "edges",
    "fuse",
    "fuse_all",
    "path_cost",
    "plan",
    "render_edges",
]
