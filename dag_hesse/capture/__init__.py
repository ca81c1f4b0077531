"""Model + loss + batch -> one traced, typed graph (design §3, capture)."""

from dag_hesse.capture.batch import Batch, batches
from dag_hesse.capture.capture import capture, trace
from dag_hesse.capture.points import default_points, resolve_points
from dag_hesse.capture.tap import tap

__all__ = ["Batch", "batches", "capture", "default_points", "resolve_points", "tap", "trace"]
