"""The C++ extension, where it was built; without it everything works, in Python and PyTorch, only slower."""

from __future__ import annotations

from typing import Any

try:
    from dag_hesse import _core as found
except ImportError:  # installed without a compiler
    found = None  # type: ignore[assignment]

core: Any = found
MISSING = (
    "the C++ extension was not built, as there was no compiler at install; PyTorch's ops run instead, more slowly. "
    "Install a C++ compiler, then: pip install --force-reinstall --no-deps --no-cache-dir dag-hesse"
)

__all__ = ["MISSING", "core"]
