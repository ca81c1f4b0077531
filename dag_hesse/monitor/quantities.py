"""What is measured: a table of quantities, each a function of one moment of training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dag_hesse.errors import OptionError, choose, kind_of
from dag_hesse.monitor import optimizers
from dag_hesse.monitor.subject import Subject
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.report import CurvatureReport

Numbers = dict[str, float]
# A start that was an eigenvector once is mixed with this much of a random vector: else Lanczos stays with an eigenvalue
# that is not the largest any more. From the eigenvector of the second of 5000 eigenvalues, 60 of 60 runs found the
# first, be it 2 % or three times as large, in 10 products (8 vectors, a residual of 1e-3); without the mixture none.
_MIX = 0.3


class Moment:
    """The subject at one step, and what its quantities share.

    Args:
        subject: it has looked at the present parameters.
        before: the parameters at the call before, if they were noted.
        starts: eigenvectors of earlier moments, by quantity; those of this one are put there.
        seed: of what the eigenvectors are mixed with.
    """

    def __init__(
        self,
        subject: Subject,
        before: Mapping[str, Tensor] | None,
        starts: MutableMapping[str, Tensor],
        seed: Sequence[int],
    ) -> None:
        self.subject, self.before, self.starts, self.seed = subject, before, starts, seed
        self.parameters = list(subject.parameters.values())
        self.report: CurvatureReport | None = None

    def largest(self, name: str, operator: SymmetricOperator) -> float:
        """The largest eigenvalue, by Lanczos from where it was last."""
        size = operator.shape[0]
        v = np.random.default_rng(self.seed).standard_normal(size)
        last = self.starts.get(name)
        if last is not None and len(last) == size:
            v = last.double().numpy() + _MIX * v / np.linalg.norm(v)
        values, vectors = operator.eigsh(1, which="LA", v0=v)
        self.starts[name] = torch.from_numpy(vectors[:, 0].copy())
        return float(values[0])

    @cached_property
    def sharpness(self) -> float:
        """λ_max(H)."""
        return self.largest("sharpness", self.subject.operator)

    @cached_property
    def scale(self) -> list[Tensor] | None:
        """P's diagonal."""
        return optimizers.preconditioner(self.subject.optimizer, self.parameters)

    @cached_property
    def preconditioned(self) -> float | None:
        """λ_max(P⁻¹H)."""
        if self.scale is None:
            return None
        return self._within("preconditioned", [p.rsqrt() for p in self.scale])

    @cached_property
    def stability(self) -> float | None:
        """η λ_max(P⁻¹H) over the edge; of several groups, that of all their steps at once."""
        adaptive = _adapts(self.subject.optimizer)
        if adaptive and self.scale is None:
            return None
        rates = optimizers.rates(self.subject.optimizer, self.parameters)
        if len(set(rates)) == 1:
            found = self.preconditioned if adaptive else self.sharpness
            return None if found is None else rates[0] * found
        scale = self.scale or [torch.ones((), dtype=torch.float64, device=p.device) for p in self.parameters]
        return self._within("stability", [(r / p).sqrt() for r, p in zip(rates, scale, strict=True)])

    def _within(self, name: str, d: Sequence[Tensor]) -> float:
        """λ_max(D H D)."""
        operator = self.subject.operator
        pairs = zip(d, self.parameters, strict=True)
        return self.largest(name, operator.congruent([x.to(p).expand_as(p).contiguous() for x, p in pairs]))


def _loss(at: Moment) -> Numbers:
    return {"loss": at.subject.operator.loss}


def _update(at: Moment) -> Numbers:
    """uᵀHu for the unit vector u along the last update, of both parts: one product."""
    d = None if at.before is None else at.subject.update(at.before)
    size = 0.0 if d is None else math.sqrt(_inner(d, d))
    if d is None or not size or not math.isfinite(size):  # the call before found parameters that were not finite
        return {}
    u = [x / size for x in d]
    gn, tensor = (_inner(u, product) for product in at.subject.operator.parts(u))
    return {"update": gn + tensor, "update_gn": gn, "update_tensor": tensor, "update_norm": size}


def _sharpness(at: Moment) -> Numbers:
    return {"sharpness": at.sharpness}


def _preconditioned(at: Moment) -> Numbers:
    return {} if at.preconditioned is None else {"preconditioned_sharpness": at.preconditioned}


def _stability(at: Moment) -> Numbers:
    return {} if at.stability is None else {"stability": at.stability}


def _blocks(at: Moment) -> Numbers:
    """R and GN-gap of the diagonal blocks of the map."""
    at.report = report = at.subject.mapper.report()
    found: Numbers = {}
    for metric in ("gn_gap", "resonance"):
        values = report[metric].diagonal().tolist()
        found |= {f"{metric}/{name}": value for name, value in zip(logged(report.names), values, strict=True)}
    return {name: value for name, value in found.items() if math.isfinite(value)}  # a zero block has no gap


QUANTITIES: dict[str, Callable[[Moment], Numbers]] = {
    "loss": _loss,
    "update": _update,
    "sharpness": _sharpness,
    "preconditioned": _preconditioned,
    "stability": _stability,
    "blocks": _blocks,
}


def chosen(quantities: Any, optimizer: Any) -> tuple[str, ...]:
    """Those that are asked for, in the table's order; None: all that there are with this optimizer.

    Raises:
        OptionError: there are no such ones.
    """
    missing = _missing(optimizer)
    if quantities is None:
        return tuple(name for name in QUANTITIES if name not in missing)
    if isinstance(quantities, str) or not isinstance(quantities, Sequence) or not quantities:
        raise OptionError(f"quantities={quantities!r}; expected a list of some of {', '.join(QUANTITIES)}, or None.")
    for name in quantities:
        choose("quantities", name, QUANTITIES)
        if name in missing:
            raise OptionError(f"'{name}' is measured {missing[name]}.")
    return tuple(name for name in QUANTITIES if name in quantities)


def _adapts(optimizer: Any) -> bool:
    found = optimizers.rule(optimizer)
    return found is not None and found.scale is not None


def _missing(optimizer: Any) -> dict[str, str]:
    """Quantities that there are not, and where they are."""
    received = "none was given" if optimizer is None else f"received {kind_of(optimizer)}"
    known = [kind for kind, found in optimizers.RULES.items() if found.scale is not None]
    found: dict[str, str] = {}
    if not _adapts(optimizer):
        found["preconditioned"] = f"with optimizer= one of {', '.join(k.__name__ for k in known)}; {received}"
    if optimizers.rule(optimizer) is None:
        names = ", ".join(k.__name__ for k in optimizers.RULES)
        found["stability"] = f"with optimizer= one of {names} (without maximize); {received}"
    return found


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """In float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def logged(names: Sequence[str]) -> list[str]:
    """Names of points as every logger takes them: letters, digits and ``_ - . /``; as they are where two would agree.

    Examples:
        >>> logged(["layer[0]", "head.weight"])
        ['layer_0', 'head.weight']
    """
    plain = [re.sub(r"[^\w./-]+", "_", name).strip("_") or "model" for name in names]
    return plain if len(set(plain)) == len(plain) else list(names)
