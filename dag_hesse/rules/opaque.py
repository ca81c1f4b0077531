"""The fallback: autograd on one op alone, exact wherever the op can be differentiated twice in reverse mode.

Linearization runs the op once; adjoints read the tape that this left, tangents too where the op has no forward mode
(or a wrong one). An op that draws random numbers is refused, as it would draw others.

Complex tensors follow PyTorch's convention: tangents and adjoints are complex, and transpose means the one in the real
inner product Re⟨a, b⟩.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dag_hesse.errors import NonDifferentiableError, out_of_memory
from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.rules.base import Buffers, Call, Linearized, Pairs, Residual, Rule, Samples, Tangents

_Tensors = Sequence[Tensor]


@final
class _Tape:
    """One run of the op on leaves of its own: the values of the active slots."""

    def __init__(self, node: Node, values: _Tensors, slots: Sequence[int]) -> None:
        self.leaves = [values[slot].detach().requires_grad_() for slot in slots]
        with torch.enable_grad():
            # A copy goes in: what the op saves as its own output must not be a leaf, nor what it writes to be ours.
            copies = {slot: leaf.clone() for slot, leaf in zip(slots, self.leaves, strict=True)}
            self.value = execute(node, [copies.get(slot, value) for slot, value in enumerate(values)])

    def pull(self, abar: Tensor) -> list[Tensor]:
        """Dᵀ ā."""
        return _gradient([self.value], self.leaves, [abar])

    def pullback(self, abar: Tensor) -> list[Tensor]:
        """Dᵀ ā on the tape: a function of the leaves, and of ā if that requires grad."""
        return _gradient([self.value], self.leaves, [abar], on_tape=True)


def _gradient(of: _Tensors, leaves: _Tensors, seeds: _Tensors, *, on_tape: bool = False) -> list[Tensor]:
    """Gradient of Re⟨of, seeds⟩; zero where nothing depends on a leaf."""
    pairs = [(y, seed) for y, seed in zip(of, seeds, strict=True) if y.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        with torch.enable_grad():
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                leaves,
                [seed for _, seed in pairs],
                create_graph=on_tape,
                retain_graph=True,
                allow_unused=True,
            )
    filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return filled if on_tape else [g.detach() for g in filled]


def _inner(a: _Tensors, b: _Tensors) -> float:
    """Re⟨a, b⟩ in double precision."""
    wide = torch.complex128 if any(x.is_complex() for x in a) else torch.float64
    return sum(float((x.detach().to(wide).conj() * y.detach().to(wide)).sum().real) for x, y in zip(a, b, strict=True))


def _norm(x: _Tensors) -> float:
    return _inner(x, x) ** 0.5


def _rows(x: Tensor) -> list[Tensor]:
    """Probe by probe, each in memory of its own: complex views of reals are not had at odd offsets."""
    return [row.clone() for row in x]


def _random(like: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Normal tensors from a generator of our own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu").to(x.device) for x in like]


def _is_random(node: Node) -> bool:
    return node.draws or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


@contextmanager
def _named(node: Node) -> Iterator[None]:
    """What autograd cannot do is an error that names the op."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        text = str(error).split("\n")[0]
        raise NonDifferentiableError(f"{node.where} cannot be differentiated twice: {text}") from error


@final
class _Opaque(Linearized):
    def __init__(self, call: Call) -> None:
        if _is_random(call.node):
            raise NonDifferentiableError(
                f"{call.node.where} draws random numbers inside: its derivatives at what it drew cannot be had."
            )
        self.call = call
        self.slots = [slot for slot, on in enumerate(call.active) if on]
        self.tape = _Tape(call.node, call.values, self.slots)
        self.push_one = self._checked_push()
        self.mu: list[Tensor] | None = None

    def _checked_push(self) -> Callable[[_Tensors], Tensor]:
        """A way to move tangents whose transpose is the pullback, as the formulas of rare ops are not always right."""
        if not self.tape.value.requires_grad:
            return lambda tangents: torch.zeros_like(self.tape.value).detach()
        (abar,), tangents = _random([self.tape.value], 1), _random(self.tape.leaves, 2)
        pulled = self.tape.pull(abar)
        expected = _inner(pulled, tangents)
        reasons: list[str] = []
        for way in (self._forward_mode, self._transposed):
            try:
                push = way()
                moved = push(tangents)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                reasons.append(str(error).split("\n")[0])
                continue
            scale = max(_norm([abar]) * _norm([moved]), _norm(tangents) * _norm(pulled))
            off = abs(_inner([moved], [abar]) - expected)
            if not math.isfinite(expected) or off <= torch.finfo(moved.dtype).eps ** 0.6 * scale:
                return push
            reasons.append("its backward is not linear, or cannot be differentiated itself (once_differentiable)")
        raise NonDifferentiableError(f"{self.call.node.where} cannot be differentiated: {'; '.join(reasons)}")

    def _forward_mode(self) -> Callable[[_Tensors], Tensor]:
        def push(tangents: _Tensors) -> Tensor:
            with forward_ad.dual_level(), torch.no_grad():
                values = list(self.call.values)
                for slot, leaf, xdot in zip(self.slots, self.tape.leaves, tangents, strict=True):
                    values[slot] = forward_ad.make_dual(leaf.detach().clone(), xdot)
                moved = forward_ad.unpack_dual(execute(self.call.node, values)).tangent
            return torch.zeros_like(self.tape.value).detach() if moved is None else moved.detach()

        return push

    def _transposed(self) -> Callable[[_Tensors], Tensor]:
        """The transpose of the pullback, which is linear: taken where no formula is at a point of its own."""
        (abar,) = _random([self.tape.value], 3)
        abar.requires_grad_()
        pulled = self.tape.pullback(abar)
        return lambda tangents: _gradient(pulled, [abar], tangents)[0]

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        found = super().bind(lam, slots, into)
        if lam is not None and self.call.curved:
            with _named(self.call.node):
                self.mu = self.tape.pullback(lam[0].detach())
        return found

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        full = self._full(tangents)
        moved = torch.stack([self.push_one(row) for row in zip(*map(_rows, full), strict=True)]) if onward else None
        return moved, full if curved and self.mu is not None else None

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        if not slots:
            return {}
        terms = {} if residual is None else self._terms(residual)
        if abar is None:
            return {slot: terms[slot] for slot in slots}
        every = [torch.stack(column) for column in zip(*map(self.tape.pull, _rows(abar)), strict=True)]
        found = {slot: every[self.slots.index(slot)] for slot in slots}
        for slot in found if residual is not None else ():
            found[slot][rows] += terms[slot]
        return found

    def _terms(self, tangents: _Tensors) -> dict[int, Tensor]:
        """Per slot Σ_j (T·λ) ẋ_j: T·λ is symmetric, so that is the gradient of ⟨Dᵀλ, ẋ⟩."""
        assert self.mu is not None
        with _named(self.call.node):
            rows = [_gradient(self.mu, self.tape.leaves, row) for row in zip(*map(_rows, tangents), strict=True)]
        return {slot: torch.stack(column) for slot, column in zip(self.slots, zip(*rows, strict=True), strict=True)}

    def _full(self, tangents: Tangents) -> list[Tensor]:
        probes = next(iter(tangents.values())).shape[0]
        return [
            tangents[slot] if slot in tangents else self.call.values[slot].new_zeros(probes, *self.call.shape(slot))
            for slot in self.slots
        ]


_STEPS = (1e-4, 1e-5)  # of the input's size, in double precision


def second_order_fault(call: Call) -> str | None:
    """What is wrong with autograd's second derivative of an OPAQUE call; None: nothing.

    Σ_j (T·λ) ẋ_j at a random λ and ẋ is compared with central differences of the pullback, in double precision where
    the op runs in it: about seven times the op's own backward. Where the pullback jumps (a kink lies at the very
    input), there is no second derivative, and autograd's is as good as any.

    Examples:
        >>> from dag_hesse.ir import Ref
        >>> x = torch.randn(3)
        >>> node = Node(1, "sin", torch.sin, (Ref(0),), {}, (0,), (3,), x.dtype, Kind.OPAQUE)
        >>> second_order_fault(Call(node, (x,), x.sin(), (True,))) is None
        True
    """
    try:
        call = replace(_widened(call), curved=True)
        lin = _Opaque(call)
        (lam,), rest = _random([lin.tape.value], 4), _random(lin.tape.leaves, 5)
        lin.bind(lam[None], (), {})
        xdot = [x * _size(leaf) for x, leaf in zip(rest, lin.tape.leaves, strict=True)]
        found = _fault_along(call, lin, lam, xdot)
        turned = [_alike(x, leaf) for x, leaf in zip(xdot, lin.tape.leaves, strict=True)]
        if found is not None and any(a is not b for a, b in zip(turned, xdot, strict=True)):
            found = _fault_along(call, lin, lam, turned)
        return found
    except (RuntimeError, NonDifferentiableError) as error:
        if out_of_memory(error):
            raise
        return str(error).split("\n")[0]


def _fault_along(call: Call, lin: _Opaque, lam: Tensor, xdot: _Tensors) -> str | None:
    found = lin._terms([x.unsqueeze(0) for x in xdot])
    exact = torch.cat([_real(found[slot][0]) for slot in lin.slots])
    eps = torch.finfo(lin.tape.value.dtype).eps
    steps = [step * (1 if eps < 1e-10 else 100) for step in _STEPS]
    coarse, fine = (_differences(call, lin, lam, xdot, step) for step in steps)
    noise = 30 * eps / steps[1] * float(torch.cat([_real(g) for g in lin.tape.pull(lam)]).abs().max())
    return _disagreement(exact, coarse, fine, noise, 1e-4 if eps < 1e-10 else 1e-2)


def _alike(xdot: Tensor, x: Tensor) -> Tensor:
    """A direction that keeps a matrix symmetric or triangular: ops that read one triangle mean no others."""
    x = x.detach()
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        return xdot
    if torch.allclose(x, x.mH):
        return xdot + xdot.mH
    lower, upper = not bool(x.triu(1).any()), not bool(x.tril(-1).any())
    return xdot.tril() if lower else xdot.triu() if upper else xdot


def _size(x: Tensor) -> float:
    """How large the finite elements are; 1 where all are zero."""
    known = x.detach()[x.isfinite()]
    found = float(known.abs().mean()) if known.numel() else 0.0
    return found or 1.0


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
_WIDE[torch.complex64] = torch.complex128


def _widened(call: Call) -> Call:
    """The call in double precision, if the op runs in it."""
    if all(v.dtype not in _WIDE for v in call.values):
        return call
    values = tuple(v.to(_WIDE.get(v.dtype, v.dtype)) for v in call.values)
    try:
        with torch.no_grad():
            return Call(call.node, values, execute(call.node, [v.clone() for v in values]), call.active)
    except Exception as error:  # a kernel of the user's may refuse in any way
        if out_of_memory(error):
            raise
        return call


def _real(x: Tensor) -> Tensor:
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1).double()


def _differences(call: Call, lin: _Opaque, lam: Tensor, xdot: _Tensors, step: float) -> Tensor:
    """Central differences of Dᵀλ along ẋ."""

    def at(offset: float) -> Tensor:
        values = list(call.values)
        for slot, x in zip(lin.slots, xdot, strict=True):
            values[slot] = values[slot] + offset * x
        return torch.cat([_real(g) for g in _Tape(call.node, values, lin.slots).pull(lam)])

    return (at(step) - at(-step)) / (2 * step)


def _disagreement(exact: Tensor, coarse: Tensor, fine: Tensor, noise: float, tolerance: float) -> str | None:
    known = coarse.isfinite() & fine.isfinite()
    exact, coarse, fine = exact[known], coarse[known], fine[known]
    if not bool(exact.isfinite().all()):
        return "PyTorch's second derivative of it is not finite, where differences of the first are"
    if not len(exact):
        return None
    bound = tolerance * (exact.abs() + fine.abs()) + 1e-2 * tolerance * float(exact.abs().max()) + noise
    bound = bound + (coarse - fine).abs() / 10  # they err as step²: the finer ones by a hundredth of this
    off = torch.minimum((exact - coarse).abs(), (exact - fine).abs()) > bound
    wrong = off & (fine.abs() <= 5 * coarse.abs() + bound)  # differences over a jump grow as 1/step
    if not bool(wrong.any()):
        return None
    return (
        "PyTorch's second derivative of it is not the derivative of its first "
        f"({float(exact[wrong][0]):.4g} where differences give {float(fine[wrong][0]):.4g})"
    )


def _all_pairs(node: Node) -> Pairs:
    slots = range(len(node.inputs))
    return frozenset((i, j) for i in slots for j in slots)


OPAQUE = Rule(Kind.OPAQUE, _Opaque, _all_pairs, Samples.UNKNOWN)

__all__ = ["OPAQUE", "second_order_fault"]
