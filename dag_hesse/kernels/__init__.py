"""Fused kernels, one folder each; ``naive.py`` is the definition in plain torch."""
