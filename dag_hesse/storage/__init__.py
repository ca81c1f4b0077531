"""Block matrices that are stored: a basis per point and a core per pair, with errors, products, solves and files."""

from dag_hesse.operators.solve import Solution
from dag_hesse.storage.block import StoredBlock
from dag_hesse.storage.matrix import BlockMatrix
from dag_hesse.storage.pairs import Storage

__all__ = ["BlockMatrix", "Solution", "Storage", "StoredBlock"]
