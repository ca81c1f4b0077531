"""Curvature during training: measured now and then on a fixed batch, given to whatever logs.

Adapters are in ``dag_hesse.monitor.lightning``, ``.hugging_face`` and ``.tensorboard``, which import their libraries.
"""

from dag_hesse.monitor.changes import Change
from dag_hesse.monitor.log import Failure
from dag_hesse.monitor.monitor import Monitor

__all__ = ["Change", "Failure", "Monitor"]
