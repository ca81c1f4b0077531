"""Model + loss + batch -> one typed graph (design §3, capture)."""

from dag_hesse._capture.batch import Batch, first_batch
from dag_hesse._capture.defaults import default_points
from dag_hesse._capture.points import parameter_points, points_like, resolve_points
from dag_hesse._capture.run import capture, capture_all, captured, needs_split, unwrapped
from dag_hesse._capture.stream import Batches
from dag_hesse._capture.taps import tap

__all__ = [
    "Batch",
    "Batches",
    "capture",
    "capture_all",
    "captured",
    "default_points",
    "first_batch",
    "needs_split",
    "parameter_points",
    "points_like",
    "resolve_points",
    "tap",
    "unwrapped",
]
