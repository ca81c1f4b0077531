"""Inter-layer Hessian maps for PyTorch: which layers interact through curvature, and what Gauss-Newton misses.

>>> import torch, dag_hesse as dh
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5), torch.nn.Tanh(),
...                           torch.nn.Linear(5, 3))
>>> report = dh.analyze(net, (torch.randn(6, 4), torch.randint(0, 3, (6,))))
>>> report.names
('1', '3')
"""

from dag_hesse import errors, theory
from dag_hesse._analyze import analyze
from dag_hesse._capture import capture, tap
from dag_hesse._profile import Profile, profile
from dag_hesse._structure import Structure, structure
from dag_hesse.errors import DagHesseError
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.monitor import Monitor
from dag_hesse.operators import (
    Eigenpair,
    Estimate,
    Factor,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    Landscape,
    Solution,
    TensorOperator,
    hvp,
)
from dag_hesse.report import Comparison, CurvatureReport, Pair, ReportSeries, concat, load
from dag_hesse.storage import BlockMatrix

__version__ = "0.1.0"

__all__ = [
    "BlockMatrix",
    "Comparison",
    "CurvatureGraph",
    "CurvatureReport",
    "DagHesseError",
    "Eigenpair",
    "Estimate",
    "Factor",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "Landscape",
    "Monitor",
    "Pair",
    "Point",
    "Profile",
    "ReportSeries",
    "Solution",
    "Structure",
    "TensorOperator",
    "__version__",
    "analyze",
    "capture",
    "concat",
    "errors",
    "hvp",
    "load",
    "profile",
    "structure",
    "tap",
    "theory",
]
