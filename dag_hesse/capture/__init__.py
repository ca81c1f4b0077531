"""Model + loss + batch -> one traced, typed graph (design §3, capture)."""

from dag_hesse.capture.batch import Batch, batches
from dag_hesse.capture.capture import capture, capture_all, trace, unwrapped
from dag_hesse.capture.points import default_points, resolve_points
from dag_hesse.capture.tap import tap

__all__ = [
    "Batch",
    "batches",
    "capture",
    "capture_all",
    "default_points",
    "resolve_points",
    "tap",
    "trace",
    "unwrapped",
]
