"""What a block-diagonal preconditioner leaves out (paper, Corollary 29), from the norms of parameter blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError
from dag_hesse.report import CurvatureReport
from dag_hesse.theory.scene import check_report
from dag_hesse.theory.text import table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BandError:
    """Where ‖H‖_F² lies, by distance from the diagonal; arrays run over distances 0 … D.

    Attributes:
        names: the points.
        distance: n×n, points passed between two layers; -1 where they never meet.
        phi: Φ = Σ_{v≠w}‖H[v,w]‖_F²/‖H‖_F², the share that a block-diagonal matrix leaves out.
        by_distance: share of ‖H‖_F² in the pairs v ≠ w at every distance, (D + 1,); they add up to Φ. At distance 0
            it is that of different parameters of one layer.
        band_error: ‖H − H_band‖_F/‖H‖_F where blocks up to that distance are kept exactly, (D + 1,).
        block_diagonal_error: the same where diagonal blocks alone are kept, √Φ.
    """

    names: tuple[str, ...]
    distance: NDArray[np.int64]
    phi: float
    by_distance: Array
    band_error: Array

    @property
    def block_diagonal_error(self) -> float:
        """‖H − blkdiag(H)‖_F/‖H‖_F = √Φ."""
        return float(np.sqrt(self.phi))

    def __str__(self) -> str:
        rows = [
            (str(d), share, left)
            for d, (share, left) in enumerate(zip(self.by_distance.tolist(), self.band_error.tolist(), strict=True))
        ]
        first = f"Φ = {self.phi:.4f}: keeping diagonal blocks alone is off by {self.block_diagonal_error:.1%} of ‖H‖_F"
        return f"{first}\n{table(['distance', 'share of ‖H‖²', 'error of the band'], rows)}"


def band_errors(report: CurvatureReport) -> BandError:
    """Error of the block-diagonal matrix and of every band, as exact as the report (paper, Corollary 29).

    These are errors of *approximations that keep blocks as they are*: the least that any method with this sparsity can
    have in the Frobenius norm. K-FAC also approximates the blocks that it keeps; see
    :func:`~dag_hesse.theory.kfac_error`. Corollary 29 concludes from sρ < 1 that the error concentrates near the
    diagonal. Theorem 77, which it rests on, bounds blocks between activations by their distance, whereas the blocks
    beside the diagonal may be as large as those on it: nothing bounds Φ away from 1.

    Args:
        report: of :func:`dag_hesse.analyze`, with ``space="parameter"`` (or activations, for their blocks).

    Returns:
        :class:`BandError`.

    Raises:
        OptionError: all blocks are zero.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = dh.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), space="parameter")
        >>> found = dh.theory.band_errors(report)
        >>> abs(found.phi - report.phi) < 1e-12, found.band_error[-1]
        (True, np.float64(0.0))
    """
    check_report(report)
    distance, squares = report.distance, report.resonance**2
    total = squares.sum()
    if not total > 0:
        raise OptionError("all blocks of the report are zero, or were not asked for, so there is no error to speak of.")
    apart = ~np.eye(len(report.points), dtype=bool)
    furthest = int(distance.max(initial=0))
    shares = np.array([squares[apart & (distance == d)].sum() / total for d in range(furthest + 1)])
    beyond = np.array([squares[distance > d].sum() / total for d in range(furthest + 1)])
    return BandError(report.names, distance, report.phi, shares, np.sqrt(beyond))
