"""Models of every kind the capture must take, small enough for a dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.experiments.models import ToyAttention, ToyReluMLP, mlp, resnet18, resnet50
from tests import device


@dataclass(frozen=True)
class Case:
    """A model with a batch, the points to compare at, and how the oracle runs it."""

    model: nn.Module
    batch: Any
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    loss: Callable[..., Tensor] | None = None
    out: str = ""
    axes: Mapping[str, int] = field(default_factory=dict)
    interact: bool = False  # whether samples interact
    piecewise_linear: bool = False

    def run(self) -> Tensor:
        """The loss, as the user would compute it."""
        if isinstance(self.batch, dict):
            return self.model(**self.batch).loss
        inputs, targets = self.batch
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        output = self.model(**inputs) if isinstance(inputs, dict) else self.model(*args)
        if self.loss is not None:
            return self.loss(output, targets)
        return F.mse_loss(output, targets) if targets.is_floating_point() else F.cross_entropy(output, targets)

    def to(self, dtype: torch.dtype) -> Case:
        """The case in another floating-point type, on the device of the tests."""
        from torch.utils._pytree import tree_map

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device.NAME, dtype if x.is_floating_point() else x.dtype)

        return Case(
            self.model.to(device.NAME, dtype), tree_map(move, self.batch), self.names, self.parameters, self.loss, self.out,
            self.axes, self.interact, self.piecewise_linear,
        )  # fmt: skip


def _randomize_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)


def _images(batch: int, side: int, classes: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, channels, side, side), torch.randint(0, classes, (batch,))


def _resnet(build: Callable[..., nn.Module], training: bool = False, first: int = 0, **options: Any) -> Case:
    model = build(classes=4, width=2, **options).train(training)
    _randomize_statistics(model)
    relu = options.get("activation", nn.ReLU) is nn.ReLU
    parameters = ("stem.0.weight", "layer2.0.bn1.weight", "head.bias")
    names = ("stem", "layer1", "layer2", "layer3", "layer4")[first:]
    batch = _images(4 if training else 2, 16, 4)  # BatchNorm over fewer values is ill-conditioned
    return Case(model, batch, names, parameters, interact=training, piecewise_linear=relu and not training)


def _plain() -> Case:
    return _resnet(resnet18, skip=False, activation=nn.SiLU)


def _mlp(activation: Callable[[], nn.Module]) -> Case:
    model = mlp([3, 4, 5, 4, 3], activation)
    batch = (torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 1]))
    relu = activation is nn.ReLU
    return Case(model, batch, ("0", "1", "3", "5"), ("0.weight", "2.bias", "6.weight"), piecewise_linear=relu)


class Diamond(nn.Module):
    """Two branches merged by a sum, or by cat + Linear + σ (paper, Exp. 4)."""

    def __init__(self, merge: str) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.merge = nn.Linear(8, 4) if merge == "cat" else None
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        left, right = self.left(x).relu(), self.right(x).sigmoid()
        return self.head(F.silu(self.merge(torch.cat([left, right], 1))) if self.merge else left + right)


def _diamond(merge: str) -> Case:
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    return Case(Diamond(merge), batch, ("stem", "left", "right"), ("left.weight", "head.weight"))


class Dense(nn.Module):
    """A DenseNet-style block: every layer uses all earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(2 + 2 * k), nn.ReLU(inplace=True), nn.Conv2d(2 + 2 * k, 2, 3, padding=1))
            for k in range(3)
        )
        self.act, self.head = nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.avg_pool2d(self.act(x), 4).flatten(1))


def _dense() -> Case:
    model = Dense().eval()
    _randomize_statistics(model)
    return Case(model, _images(2, 4, 3, 2), ("layers.0", "layers.1", "layers.2", "act"), ("layers.1.2.weight",))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(3, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def _attention() -> Case:
    batch = (torch.randn(2, 3, 3), torch.tensor([0, 1]))
    return Case(Attention(), batch, ("embed", "attention"), ("attention.in_proj_weight",))


def _encoder(training: bool) -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.3 if training else 0.1, activation="gelu")
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).train(training)
    batch = (torch.randn(2, 3, 4), torch.tensor([0, 1]))
    return Case(model, batch, ("0.self_attn", "0.norm1", "0.linear1", "0"), ("0.norm1.weight", "0.linear1.weight"))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, 2, batch_first=True)
        self.gru, self.head = nn.GRU(3, 2, bidirectional=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x)
        h, _ = self.gru(h.transpose(0, 1))
        return self.head(h[-1])


def _recurrent() -> Case:
    batch = (torch.randn(2, 3, 3), torch.tensor([0, 1]))
    return Case(Recurrent(), batch, ("lstm", "gru"), ("lstm.weight_hh_l0", "gru.bias_ih_l0"), axes={"gru": 1})


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.head(h)


def _loop() -> Case:
    batch = (torch.randn(2, 3, 2), torch.tensor([0, 1]))
    return Case(Loop(), batch, ("cell", "cell[0]", "cell[2]"), ("cell.weight_hh",))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + torch.tanh(self.mix(x))).transpose(1, 2)


def _tied() -> Case:
    ids = torch.randint(0, 5, (2, 3))
    return Case(Tied(), (ids, torch.randint(0, 5, (2, 3))), ("embed", "mix"), ("embed.weight", "mix.weight"))


class Awkward(nn.Module):
    """In-place ops, views, buffers, a frozen and an unused parameter, two inputs, a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(7, 7)
        self.head = nn.Linear(4, 3)
        self.a.weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0, -2.0, 0.5, 3.0]))
        self.calls = 0

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        y[:, 1:3] *= self.b(z)[:, :2].sigmoid()
        y.view(-1, 2, 2)[:, 0].add_(1.0)
        y = y.t().contiguous().t().mul_(self.scale)
        return {"aux": y.detach(), "logits": self.head(torch.tanh(y))}


def _awkward() -> Case:
    batch = ((torch.randn(3, 3), torch.randn(3, 2)), torch.tensor([0, 1, 2]))
    loss = lambda output, targets: F.cross_entropy(output["logits"], targets)  # noqa: E731
    return Case(Awkward(), batch, ("a", "b"), ("a.weight", "b.weight", "head.weight"), loss, out="head")


class Result(NamedTuple):
    mean: Tensor
    log_variance: Tensor


class Heteroscedastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Result:
        y = self.body(x)
        return Result(y[:, :2], y[:, 2:])


def _gaussian(output: Result, targets: Tensor) -> Tensor:
    return ((output.mean - targets) ** 2 * (-output.log_variance).exp() + output.log_variance).mean() / 2


def _heteroscedastic() -> Case:
    return Case(
        Heteroscedastic(), (torch.randn(3, 3), torch.randn(3, 2)), ("body.0", "body.1"), loss=_gaussian, out="body"
    )


class Gate(nn.Module):
    """x · tanh(W x): the erratum of design §2.1."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x * torch.tanh(self.gate(x)))


def _gate() -> Case:
    return Case(Gate(), (torch.randn(3, 3), torch.tensor([0, 1, 0])), ("body", "gate"), ("gate.weight",))


def _batch_norm_cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 3, bias=False), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip
    _randomize_statistics(model)
    return Case(model, _images(3, 6, 3, 2), ("0", "2", "4"), ("0.weight", "1.weight", "4.weight"), interact=True)


def _toy(kind: type[nn.Module], *names: str) -> Case:
    return Case(kind(4), (torch.randn(3, 3, 4), torch.randn(3)), names, piecewise_linear=kind is ToyReluMLP)


def _causal(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The library's causal loss, without its cast to float32."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))


LABELS: dict[str, Any] = {"num_labels": 3}


def _hf_resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **LABELS)
    model = ResNetForImageClassification(config).eval()
    _randomize_statistics(model)
    pixels, labels = _images(2, 16, 3)
    names = ("resnet.embedder", "resnet.encoder.stages.0", "resnet.encoder.stages.1")
    return Case(model, {"pixel_values": pixels, "labels": labels}, names, out="classifier", piecewise_linear=True)


def _hf_vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        **LABELS,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    pixels, labels = _images(2, 8, 3)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer"]
    return Case(
        model, {"pixel_values": pixels, "labels": labels}, tuple(blocks), ("classifier.weight",), out="classifier"
    )


def _hf_gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
    ids = torch.randint(0, 11, (2, 4))
    parameters = ("transformer.wpe.weight", "transformer.h.1.mlp.c_fc.bias")
    names = ("transformer.h.0", "transformer.h.1.attn", "transformer.h.1")
    model = GPT2LMHeadModel(config).eval()
    model.loss_function = _causal
    return Case(model, {"input_ids": ids, "labels": ids}, names, parameters, out="lm_head")


def _hf_llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=12,
        vocab_size=11, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(0, 11, (2, 4))
    names = ("model.layers.0", "model.layers.0.mlp", "model.layers.1")
    model = LlamaForCausalLM(config).eval()
    model.loss_function = _causal
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32, whatever the model's type
            model.set_submodule(name, nn.RMSNorm(8, eps=module.variance_epsilon))
    return Case(model, {"input_ids": ids, "labels": ids}, names, ("model.norm.weight",), out="lm_head")


CASES: dict[str, Callable[[], Case]] = {
    "mlp-relu": lambda: _mlp(nn.ReLU),
    "mlp-silu": lambda: _mlp(nn.SiLU),
    "mlp-tanh": lambda: _mlp(nn.Tanh),
    "resnet18-relu": lambda: _resnet(resnet18),
    "resnet18-silu-train": lambda: _resnet(resnet18, training=True, first=3, activation=nn.SiLU),
    "resnet50-gelu": lambda: _resnet(resnet50, first=2, activation=nn.GELU),
    "plain-resnet18": _plain,
    "diamond-sum": lambda: _diamond("sum"),
    "diamond-cat": lambda: _diamond("cat"),
    "densenet": _dense,
    "attention": _attention,
    "encoder-eval": lambda: _encoder(False),
    "encoder-dropout": lambda: _encoder(True),
    "recurrent": _recurrent,
    "gru-cell-loop": _loop,
    "tied": _tied,
    "awkward": _awkward,
    "heteroscedastic": _heteroscedastic,
    "gate": _gate,
    "batch-norm-train": _batch_norm_cnn,
    "toy-attention": lambda: _toy(ToyAttention, "q", "k", "v"),
    "toy-relu-mlp": lambda: _toy(ToyReluMLP, "block0", "block1", "block2"),
    "hf-resnet": _hf_resnet,
    "hf-vit": _hf_vit,
    "hf-gpt2": _hf_gpt2,
    "hf-llama": _hf_llama,
}


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """Build a case with its own seed."""
    torch.manual_seed(sorted(CASES).index(name))
    return CASES[name]().to(dtype)
