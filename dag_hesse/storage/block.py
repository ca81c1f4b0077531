"""One block of a stored matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dag_hesse.errors import OptionError, VectorError, kind_of
from dag_hesse.operators.exports import check_dense, dense, to_scipy
from dag_hesse.operators.vectors import VectorForm, to_numpy
from dag_hesse.storage.cores import size
from dag_hesse.storage.pairs import PairFacts, Storage

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix


@final
class StoredBlock:
    """The block [v, w] of a :class:`~dag_hesse.BlockMatrix`, (d_v, d_w); groups lie one behind the other."""

    def __init__(self, parent: BlockMatrix, v: int, w: int) -> None:
        self.parent, self.v, self.w = parent, v, w

    @property
    def _facts(self) -> PairFacts:
        return self.parent.pairs[min(self.v, self.w), max(self.v, self.w)]

    @property
    def kind(self) -> Storage:
        """``"dense"``, ``"low-rank"``, ``"zero"`` or ``"live"``."""
        return self._facts.kind

    @property
    def reason(self) -> str:
        """Why it is zero or live; empty else."""
        return self._facts.reason

    @property
    def distance(self) -> int:
        """Points passed on the way between the two."""
        return self._facts.distance

    @property
    def error(self) -> float:
        """Bound on ‖stored − H[v, w]‖_F; holds but with the probability ``B.facts["risk"]``."""
        return self._facts.error

    @property
    def norm(self) -> float:
        """‖H[v, w]‖_F: of what is stored; of a live or dropped block, as measured."""
        return self._facts.norm

    @property
    def _core(self) -> Tensor | None:
        stored = self.kind in (Storage.DENSE, Storage.LOW_RANK)
        return self.parent.cores.core(self.v, self.w) if stored else None

    @property
    def rank(self) -> int | None:
        """Most directions that what is stored has, in each group; None of a live block."""
        core = self._core
        return (None if self.kind is Storage.LIVE else 0) if core is None else min(core.shape[1:])

    @property
    def bytes(self) -> int:
        """Of what is stored for this pair alone; bases are shared by all blocks of a point."""
        return 0 if self._core is None else size(self._core)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_v, d_w)."""
        return self.parent.form.sizes[self.v], self.parent.form.sizes[self.w]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of vectors."""
        return self.parent.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parent.device

    def _check_room(self, need: int, what: str, instead: str) -> None:
        self.parent._check_room(need, what, instead)

    @property
    def T(self) -> StoredBlock:
        """The block [w, v]."""
        return StoredBlock(self.parent, self.w, self.v)

    def __repr__(self) -> str:
        names, facts = self.parent.names, self._facts
        return f"StoredBlock([{names[self.v]}, {names[self.w]}], {self.shape[0]} × {self.shape[1]}, {facts.kind})"

    def __matmul__(self, z: Any) -> Any:
        """The product (d_v,) or (d_v, k) with z (d_w,) or (d_w, k); of an array, an array.

        Raises:
            VectorError: it does not fit.
        """
        if not isinstance(z, (Tensor, np.ndarray)):
            raise VectorError(f"{kind_of(z)} is no vector of a block; expected a tensor or an array.")
        whole, flat = self.parent.form, z.ndim == 1
        only = VectorForm((whole.names[self.w],), (whole.shapes[self.w],), whole.dtype, whole.device)
        rows = only.pack(z)[0][0]
        found = self.parent._block_product(self.v, self.w, rows)
        product = found[0] if flat else found.T
        return to_numpy(product) if isinstance(z, np.ndarray) else product

    def dense(self) -> Tensor:
        """The matrix (d_v, d_w); of a live block, by sweeps of identity probes.

        Raises:
            MemoryBudgetError: it would not fit.
        """
        if self.kind is Storage.LIVE:
            return dense(self)
        check_dense(self)
        if self._core is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        blocks = self.parent.cores.dense(self.v, self.w)
        return torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0].contiguous()

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U, s, V) with U diag(s) Vᵀ what is stored: (groups, d_v, r), (groups, r) and (groups, d_w, r).

        Raises:
            OptionError: the block is zero or live.
        """
        core, cores = self._core, self.parent.cores
        if core is None:
            raise OptionError(f"block {self!r} has no factors: only dense and low-rank blocks do.")
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        left, right = cores.bases[self.v], cores.bases[self.w]
        return (u if left is None else left @ u), s, (vh.mT if right is None else right @ vh.mT)

    def singular_values(self) -> Tensor:
        """Of what is stored, largest first, of all groups: (groups · rank,)."""
        if (core := self._core) is None:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.linalg.svdvals(core).flatten().sort(descending=True)[0]

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        return to_scipy(self)
