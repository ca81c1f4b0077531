"""What has no nodes, in words: tensors that are not dense, and ops of functions."""

from __future__ import annotations

from torch import Tensor

# The beginning of an op's name in PyTorch, what users call it, and what to write in its place.
_IN_PLACE_OF = {
    "cond": ("torch.cond", "a Python 'if'"),
    "while_loop": ("while_loop", "a Python 'while'"),
    "map": ("map", "a Python loop and torch.stack, or torch.vmap"),
    "scan": ("scan", "a Python loop"),
    "associative_scan": ("associative_scan", "a Python loop, or torch.cumsum and its like"),
    "flex_attention": ("flex_attention", "scaled_dot_product_attention with a mask"),
}


def not_dense(x: Tensor) -> str:
    """What a tensor is called that is not dense, and what to use instead."""
    if x.is_nested:
        return f"a nested tensor ({x.layout}), which has no nodes: use a padded one and a mask"
    kind = "sparse " if str(x.layout).startswith("torch.sparse") else ""
    return f"a {kind}tensor of layout {x.layout}, which has no nodes: use a dense one"


def in_place_of(name: str, where: str) -> str:
    """That an op of functions is not captured, and what is.

    >>> in_place_of("cond", "model.py:7")
    "torch.cond at model.py:7 takes functions, and what runs inside them is not captured: write a Python 'if' instead."
    """
    called, instead = next(
        (words for start, words in _IN_PLACE_OF.items() if name.startswith(start)), (name, "its ops in Python")
    )
    return f"{called} at {where} takes functions, and what runs inside them is not captured: write {instead} instead."
