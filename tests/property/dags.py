"""Random models: DAGs of random ops with shared parameters, merges of two or three, state, writes, and a random loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.property.situations import ACROSS, ACROSS_TWO, WITHIN
from tests.property.steps.parts import WIDTH, Parts

BATCH = 2
Op = Callable[..., Tensor]

UNARY: dict[str, Op] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "leaky": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "sin": torch.sin,
    "erf": torch.erf,
    "root": lambda x: torch.sqrt(x * x + 0.5),
    "power": lambda x: (x * x + 0.5) ** 1.3,
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), eps=1e-2),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), eps=1e-2),
    "batch_mean": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "flip": lambda x: x.flip(-1) * 1.5,
    "roll": lambda x: torch.roll(x, 1, -1),
    "gather": lambda x: x[:, [2, 0, 2]],
    "pad": lambda x: F.pad(x[:, 1:], (0, 1)),
    "attend": lambda x: torch.softmax(x.unsqueeze(2) * x.unsqueeze(1), -1).sum(1),
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "in place": lambda x: x.clone().mul_(2.0).sigmoid_(),
    "variance": lambda x: x * x.var(-1, keepdim=True),
    "norm": lambda x: x / (1.0 + x.norm(dim=-1, keepdim=True)),
    "max": lambda x: x + x.amax(-1, keepdim=True),
    "expand": lambda x: x.sum(-1, keepdim=True).expand(-1, WIDTH) * 0.3,
    "constant": lambda x: torch.ones_like(x) * 0.3,
    "detach": lambda x: x.detach() * x,
}
BINARY: dict[str, Op] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - 2 * b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (1.0 + b * b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "highway": lambda a, b: torch.sigmoid(a) * b,
    "where": lambda a, b: torch.where(a > 0.1, a, b),
    "outer": lambda a, b: torch.bmm(a.unsqueeze(2), b.unsqueeze(1)).sum(1),
    "einsum": lambda a, b: torch.einsum("bi,bj->bj", a, b),
    "slice": lambda a, b: torch.cat([a[:, :1], b[:, 1:]], 1),
}
TERNARY: dict[str, Op] = {
    "sum": lambda a, b, c: a + b + c,
    "lerp": lambda a, b, c: a + torch.sigmoid(c) * (b - a),
    "addcmul": lambda a, b, c: torch.addcmul(a, b, c),
}
LOSSES: dict[str, Op] = {
    "cross entropy": lambda y, t: F.cross_entropy(y, t.argmax(1), label_smoothing=0.1),
    "squares": lambda y, t: F.mse_loss(y, t),
    "sum of squares": lambda y, t: ((y - t) ** 2).sum(),
    "huber": lambda y, t: F.huber_loss(y, t, delta=0.7),
    "kl": lambda y, t: F.kl_div(F.log_softmax(y, 1), torch.softmax(t, 1), reduction="batchmean"),
    "logistic": lambda y, t: F.binary_cross_entropy_with_logits(y, torch.sigmoid(t)),
    "two terms": lambda y, t: F.cross_entropy(y, t.argmax(1)) + 0.1 * (y**2).mean(),
    "interacting": lambda y, t: torch.logsumexp(y - t, (0, 1)),
}
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.5])
# What a batch's loss counts in a mean over several; None: the losses add up.
COUNTED: dict[str, tuple[Op, Callable[[Tensor], float] | None]] = {
    **{name: (LOSSES[name], len) for name in ("cross entropy", "squares", "huber", "kl", "logistic", "two terms")},
    "sum of squares": (LOSSES["sum of squares"], None),
    "class weights": (
        lambda y, t: F.cross_entropy(y, t.argmax(1), weight=CLASS_WEIGHTS.to(y)),
        lambda t: float(CLASS_WEIGHTS.to(t)[t.argmax(1)].sum()),
    ),
    "ignored": (
        lambda y, t: F.cross_entropy(y, t.argmax(1).where(t[:, 0] < 0.8, -100)),
        lambda t: int((t[:, 0] < 0.8).sum()),
    ),
    "summed entropy": (lambda y, t: F.cross_entropy(y, t.argmax(1), reduction="sum"), None),
}


@dataclass(frozen=True)
class Step:
    """One node: an op (or a layer of a shared pool) and the earlier nodes that it uses."""

    op: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A whole model: steps, loss, seed of the weights."""

    steps: tuple[Step, ...]
    loss: str
    seed: int

    def reaching(self) -> list[int]:
        """Steps that the loss depends on."""
        found = {len(self.steps)}
        for k in range(len(self.steps), 0, -1):
            step = self.steps[k - 1]
            if k in found and step.op != "constant":
                found |= set(step.inputs)
        return [k - 1 for k in sorted(found) if k > 0]


class Dag(Parts):
    """The recipe as a module; node k's output passes through the module ``nodes.k``."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.pool = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=k % 2 == 0) for k in range(2))
        self.merge = nn.Linear(2 * WIDTH, WIDTH)
        self.nodes = nn.ModuleList(nn.Identity() for _ in recipe.steps)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.touched = [], set()
        values = [x]
        for step, node in zip(self.recipe.steps, self.nodes, strict=True):
            given = [values[k] for k in step.inputs]
            values.append(node(self.apply_op(step.op, given)))
        return values[-1]

    def apply_op(self, op: str, given: list[Tensor]) -> Tensor:
        """Run one step."""
        if op.startswith("linear"):
            return self.pool[int(op[-1])](given[0])
        if op == "cat":
            return self.merge(torch.cat(given, 1))
        if op in SITUATIONS:
            return SITUATIONS[op](self, *given)
        return {**UNARY, **BINARY, **TERNARY}[op](*given)


SITUATIONS = {**WITHIN, **ACROSS, **ACROSS_TWO}
PURE = {1: [*UNARY, "linear0", "linear1"], 2: [*BINARY, "cat"], 3: list(TERNARY)}
STATEFUL = {1: [*WITHIN, *WITHIN, *PURE[1]], 2: PURE[2], 3: PURE[3]}
WRITING = {1: [*ACROSS, *ACROSS, *ACROSS, *WITHIN, "linear1"], 2: [*ACROSS_TWO, *BINARY], 3: PURE[3]}


@st.composite
def recipes(draw: st.DrawFn, vocabulary: dict[int, list[str]] = PURE) -> Recipe:
    """Recipes of two to six steps; the last step uses the one before it, so that nothing is cut off by chance."""
    steps = [Step("linear0", (0,))]
    for k in range(1, draw(st.integers(2, 6))):
        arity = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))
        names = vocabulary[arity]
        inputs = [*(draw(st.integers(0, k)) for _ in range(arity - 1)), k]
        steps.append(Step(draw(st.sampled_from(names)), tuple(draw(st.permutations(inputs)))))
    return Recipe(tuple(steps), draw(st.sampled_from(sorted(LOSSES))), draw(st.integers(0, 10**6)))
