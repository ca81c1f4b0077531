"""Norms of blocks: exactly by identity probes or Gram matrices, or by Rademacher probes with their standard errors."""

from dag_hesse.estimate.exact import exact_blocks
from dag_hesse.estimate.metrics import METRICS, Metrics, assemble
from dag_hesse.estimate.norms import Norm, NormTable
from dag_hesse.estimate.run import estimate

__all__ = ["METRICS", "Metrics", "Norm", "NormTable", "assemble", "estimate", "exact_blocks"]
