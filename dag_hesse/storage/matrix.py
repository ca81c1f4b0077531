"""A stored symmetric block matrix over a model's points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor, nn

from dag_hesse.errors import OptionError, PointError, choose, position
from dag_hesse.names import selected
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.block import Block
from dag_hesse.operators.estimates import answered
from dag_hesse.operators.solve import Solution
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.options import checked_options
from dag_hesse.ranks import Ranks
from dag_hesse.storage.block import StoredBlock
from dag_hesse.storage.build import Built
from dag_hesse.storage.live import Live
from dag_hesse.storage.options import PARTS
from dag_hesse.storage.pairs import PairFacts, Storage
from dag_hesse.storage.slices import submatrix
from dag_hesse.storage.solve import solved
from dag_hesse.storage.whole import dense_of, diagonal_of

_CHUNK = 64  # vectors that are multiplied together


@final
class BlockMatrix(SymmetricOperator):
    """The Hessian of a model, or one of its parts, stored by blocks over n points (paper, Appendix K; design §3).

    Made by :meth:`from_model`, ``report.blocks()`` or :meth:`load`. It holds numbers, not the model: products, norms,
    eigenvalues and solves need no sweep, but for blocks that are *live*. ``B @ z`` and what else operators do is
    inherited; vectors are flat, columns, or lists or dicts by point.

    Attributes:
        form: names, shapes and types of the points' vectors, in topological order.
        cores: the numbers: a basis per point, a core per pair (:mod:`dag_hesse.storage.cores`).
        pairs: what is known of every pair v ≤ w, by number.
        facts: part, route, band, eps, seconds, sweeps; ``size``, ‖H‖_F; within the band, ``error``, the estimate of
            ‖B − H‖_F / ‖H‖_F, and ``bound`` on ‖B − H‖_F, exceeded with probability ``risk``; beyond it, a bound on
            the norm of what is ``dropped``.
    """

    def __init__(
        self,
        form: VectorForm,
        built: Built,
        live: Live | None = None,
        parts: Mapping[str, BlockMatrix] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.form, self.cores, self.pairs, self.facts = form, built.cores, built.pairs, built.facts
        self._live, self._parts = live, dict(parts or {})
        self._places = list(range(len(form.names)) if places is None else places)  # of points among the live source's

    @classmethod
    def from_model(cls, model: nn.Module, batch: Any, **options: Any) -> BlockMatrix:
        """Capture a model and store its blocks.

        Args:
            model, batch, loss, output, points, space, reduction, verify, progress: as for
                :func:`~dag_hesse.analyze`.
            batch_mode: ``"shared"`` or ``"joint"`` (there, one block a sample where samples do not interact).
            part: ``"full"``, ``"gn"`` or ``"tensor"``.
            parts: whether to store the other two parts as well, for :meth:`part`.
            error: what is stored may be off by this share of ‖H‖_F, by the estimate of probes that took no part in
                building it; 0: none (Gram factors, or dense blocks). None: 0.01, or no limit where ``rank`` is given.
            rank: most directions of a point that is not stored in its own coordinates.
            memory: bytes that the stored blocks may take, as an integer or as ``"4GiB"``; directions that lose least
                for their bytes are left out first. None: no limit but what is free.
            band: largest distance of pairs that are stored; ``"error"``: the least such that what is dropped is within
                ``error``. None: all pairs.
            eps: instead of ``band``, the interaction radius k_ε as measured: beyond it, every block is below ε times
                the diagonal blocks of both its points (Definition 79).
            rest: what becomes of pairs beyond the band: ``"drop"`` (zero) or ``"live"`` (swept in every product).
            seed: of the probes. The global RNG is neither read nor changed.
            mesh: as for :func:`~dag_hesse.analyze`. Every rank has the whole matrix; products with live blocks are made
                on all ranks together.

        Raises:
            DagHesseError: a subclass says what was received, what was expected and what to do, before heavy work.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
            >>> B = dh.BlockMatrix.from_model(model, (torch.randn(10, 8), torch.arange(10) % 3), points=["0", "1"])
            >>> B.shape, B["0", "1"].kind.value, (B @ torch.ones(12)).shape
            ((12, 12), 'dense', torch.Size([12]))
        """
        from dag_hesse.storage.pose import from_model

        return from_model(model, batch, **options)

    @property
    def chunk(self) -> int:
        """How many vectors are multiplied together."""
        return _CHUNK

    @property
    def _together(self) -> Ranks | None:
        return None if self._live is None else self._live.source.problem.ranks

    @property
    def groups(self) -> int:
        """Blocks that a pair has: one a sample in ``"joint"`` mode where samples do not interact, else one."""
        return self.cores.groups

    @property
    def bytes(self) -> int:
        """Of what is stored."""
        return self.cores.bytes

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        z = [x.reshape(len(x), self.groups, -1) for x in segments]
        found = self.cores.products(z)
        if self._live is not None and self._live.pairs:
            extra = self._live.products(dict(zip(self._places, z, strict=True)))
            found = [x + extra[k] if k in extra else x for k, x in zip(self._places, found, strict=True)]
        return [x.reshape(len(x), -1) for x in found]

    def _block_product(self, v: int, w: int, rows: Tensor) -> Tensor:
        """H[v, w] z: (k, size_w) -> (k, size_v)."""
        z = rows.reshape(len(rows), self.groups, -1)
        kind = self.facts_of(v, w).kind
        if kind is Storage.ZERO:
            return rows.new_zeros(len(rows), self.form.sizes[v])
        if kind is Storage.LIVE:
            assert self._live is not None
            found = self._live.block(self._places[v], self._places[w], z)
        else:
            found = self.cores.expand(v, self.cores.compress(w, z) @ self.cores.core(v, w).mT)
        return found.reshape(len(rows), -1)

    def __getitem__(self, key: Any) -> Any:
        """``B[v, w]``: a block, by names, positions, globs or lists of these, as ``H[v, w]`` of an operator takes them.

        Of one point on each side it is a :class:`~dag_hesse.storage.block.StoredBlock`, of several a rectangular block
        to multiply with. ``B[["a", "layer*"]]``: the matrix of some points.

        Raises:
            PointError: there is no such point.
        """
        if isinstance(key, tuple):
            if len(key) != 2:
                raise PointError(f"a block is named by two points; received {len(key)}.")
            rows, columns = (selected(self.names, side, "this matrix") for side in key)
            if len(rows) == len(columns) == 1:
                return StoredBlock(self, rows[0], columns[0])
            return Block(self, rows, columns)
        return submatrix(self, selected(self.names, key, "this matrix"))

    def part(self, part: str) -> BlockMatrix:
        """The stored ``"full"``, ``"gn"`` or ``"tensor"`` part; others than the matrix itself need ``parts=True``.

        Raises:
            OptionError: it was not stored.
        """
        choose("part", part, PARTS)
        if part == self.facts["part"]:
            return self
        if part not in self._parts:
            raise OptionError(f"part '{part}' is not stored: make the matrix with parts=True, or with part='{part}'.")
        return self._parts[part]

    def norms(self) -> np.ndarray:
        """‖H[v, w]‖_F, n×n float64: of what is stored; of live and dropped blocks, as measured."""
        found = np.zeros((len(self.names),) * 2)
        for (v, w), facts in self.pairs.items():
            found[v, w] = found[w, v] = facts.norm
        return found

    def norm(self) -> float:
        """‖B‖_F of what is stored or live."""
        every = range(len(self.names))
        kept = np.array([[self.facts_of(v, w).kind is not Storage.ZERO for w in every] for v in every])
        return float(np.sqrt((self.norms() ** 2)[kept].sum()))

    def to_dense(self) -> Tensor:
        """The matrix (n, n), equal to its transpose to the bit.

        Raises:
            MemoryBudgetError: it would not fit.
        """
        return dense_of(self)

    def dense(self) -> Tensor:
        return self.to_dense()

    def diagonal(
        self, matvecs: int | None = None, seed: int = 0, return_stderr: bool = False, method: str = "exact"
    ) -> Any:
        """The diagonal (n,), from the cores: no random vectors are taken, whatever the arguments."""
        return answered(diagonal_of(self), return_stderr)

    def trace(
        self, matvecs: int | None = None, seed: int = 0, return_stderr: bool = False, method: str = "exact"
    ) -> Any:
        """The trace (), from the diagonal."""
        return answered(self.diagonal().sum(), return_stderr)

    @checked_options(solved)
    def solve(self, b: Any, damping: float = 0.0, **options: Any) -> Solution:
        """x with (B + λ I) x = b, for λ = ``damping`` and b in any form of a vector.

        Where B + λI is positive definite, by a Cholesky factorization of the cores, block by block within the band;
        directions outside all bases are divided by λ. Else by SciPy's MINRES; ``rtol`` and ``maxiter`` are its options.

        Returns:
            ``(x, residual, method, iterations)``; ``residual`` is ‖b − (B + λI) x‖ / ‖b‖, the largest of the columns.

        Raises:
            OptionError: ``damping`` is no number from 0 on.
            NonFiniteError: ``b`` holds NaN or infinity.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
            >>> B = dh.BlockMatrix.from_model(model, (torch.randn(9, 4), torch.arange(9) % 3), points=["0"], part="gn")
            >>> step = B.solve(torch.ones(B.shape[0]), damping=0.1)
            >>> step.method, step.residual < 1e-4
            ('cholesky', True)
        """
        return solved(self, b, damping, **options)

    def save(self, path: str | Path) -> None:
        """Write everything as one safetensors file with JSON in its header, whole or not at all.

        Raises:
            OptionError: some blocks are live: they need the model.
        """
        from dag_hesse.storage.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> BlockMatrix:
        """Read what :meth:`save` wrote; numbers are mapped from the file, and read when they are used.

        Raises:
            MissingFileError: no such file.
            BlockFileError: it is no such file, is cut short, or has a newer format.
        """
        from dag_hesse.storage.files import load

        return load(path)

    def __str__(self) -> str:
        from dag_hesse.storage.text import render

        return render(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """How blocks are stored, and singular values, as a matplotlib Figure (extra: ``plot``), saved at ``path``."""
        from dag_hesse.storage.plots import overview

        return overview(self, path)

    def facts_of(self, v: str | int, w: str | int) -> PairFacts:
        """What is known of a pair, by names or numbers, in any order."""
        i, j = (position(point, self.names, "this matrix") for point in (v, w))
        return self.pairs[min(i, j), max(i, j)]

    def __reduce__(self) -> Any:
        raise OptionError("a block matrix is not pickled: save() writes it, dag_hesse.BlockMatrix.load() reads it.")
