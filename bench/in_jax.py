"""The benchmark's models in plain JAX, as functions of PyTorch's parameters; products under ``jit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import LanguageModel, VisionTransformer, Workload

Parameters = Mapping[str, Any]


Product = Callable[[], dict[str, Tensor]]


def _posed(work: Workload, v: Mapping[str, Tensor]) -> tuple[Callable[[Parameters], Any], Parameters, Parameters]:
    """The loss's gradient, parameters and a vector.

    Raises:
        NotImplementedError: the model is none of those below.
    """
    import jax
    import jax.numpy as jnp

    forward = _forward(work.model)
    if forward is None:
        raise NotImplementedError(f"{type(work.model).__name__} is not written in JAX here")
    x, y = jnp.asarray(work.x.numpy()), jnp.asarray(work.y.numpy())

    def loss(params: Parameters) -> Any:
        logits = forward(params, x)  # classes last
        scores = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))
        return -jnp.take_along_axis(scores, y[:, None], -1).mean()

    def turned(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: jnp.asarray(t.detach().numpy()) for name, t in tensors.items()}

    return jax.grad(loss), turned(dict(work.model.named_parameters())), turned(v)


def _back(found: Parameters) -> dict[str, Tensor]:
    import jax

    return {name: torch.from_dlpack(t) for name, t in jax.block_until_ready(found).items()}


def product(work: Workload, v: Mapping[str, Tensor]) -> Product:
    """JAX's H·v under ``jit``."""
    import jax

    gradient, params, tangent = _posed(work, v)
    run = jax.jit(lambda p, t: jax.jvp(gradient, (p,), (t,))[1])
    return lambda: _back(run(params, tangent))


def linearized(work: Workload, v: Mapping[str, Tensor]) -> Product:
    """JAX's H·v under ``jit``, linearized once."""
    import jax

    gradient, params, tangent = _posed(work, v)
    push = jax.jit(jax.linearize(gradient, params)[1])
    return lambda: _back(push(tangent))


def _forward(model: nn.Module) -> Callable[[Parameters, Any], Any] | None:
    """(parameters, inputs) -> logits, classes last."""
    if isinstance(model, VisionTransformer):
        return _vision_transformer
    if isinstance(model, LanguageModel):
        return _language_model
    if all(isinstance(layer, nn.Linear | nn.SiLU) for layer in model.children()):
        return _chain
    return None


def _linear(p: Parameters, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _norm(p: Parameters, name: str, x: Any) -> Any:
    import jax

    centered = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return centered * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(qkv: Any, heads: int, causal: bool) -> Any:
    """(batch, S, 3·width) -> (batch, S, width)."""
    import jax
    import jax.numpy as jnp

    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * (width // heads) ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), v).reshape(batch, length, width)


def _chain(p: Parameters, x: Any) -> Any:
    import jax

    layers = sorted((name.removesuffix(".weight") for name in p if name.endswith(".weight")), key=int)
    for layer in layers[:-1]:
        x = jax.nn.silu(_linear(p, layer, x))
    return _linear(p, layers[-1], x)


def _vision_transformer(p: Parameters, x: Any) -> Any:
    import jax

    batch, side = x.shape[0], x.shape[2] // 16
    patches = x.reshape(batch, 3, side, 16, side, 16).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    x = patches @ p["patches.weight"].reshape(192, -1).T + p["patches.bias"] + p["position"]
    for k in range(12):
        block = f"blocks.{k}"
        qkv = _norm(p, f"{block}.norm1", x) @ p[f"{block}.self_attn.in_proj_weight"].T
        qkv = qkv + p[f"{block}.self_attn.in_proj_bias"]
        x = x + _linear(p, f"{block}.self_attn.out_proj", _attention(qkv, 3, causal=False))
        inner = jax.nn.gelu(_linear(p, f"{block}.linear1", _norm(p, f"{block}.norm2", x)), approximate=False)
        x = x + _linear(p, f"{block}.linear2", inner)
    return _linear(p, "head", x.mean(1))


def _language_model(p: Parameters, ids: Any) -> Any:
    import jax

    def turned(name: str, x: Any) -> Any:  # GPT-2's weights are inputs by outputs
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    body = "body.transformer"
    x = p[f"{body}.wte.weight"][ids] + p[f"{body}.wpe.weight"][: ids.shape[1]]
    for k in range(4):
        block = f"{body}.h.{k}"
        qkv = turned(f"{block}.attn.c_attn", _norm(p, f"{block}.ln_1", x))
        x = x + turned(f"{block}.attn.c_proj", _attention(qkv, 4, causal=True))
        inner = jax.nn.gelu(turned(f"{block}.mlp.c_fc", _norm(p, f"{block}.ln_2", x)), approximate=True)
        x = x + turned(f"{block}.mlp.c_proj", inner)
    return _norm(p, f"{body}.ln_f", x) @ p[f"{body}.wte.weight"].T
