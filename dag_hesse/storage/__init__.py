"""Block matrices that are stored: a basis per point and a core per pair, with errors, products, solves and files."""

from dag_hesse.storage.block import StoredBlock
from dag_hesse.storage.matrix import BlockMatrix
from dag_hesse.storage.pairs import Storage
from dag_hesse.storage.solve import Solution

__all__ = ["BlockMatrix", "Solution", "Storage", "StoredBlock"]
