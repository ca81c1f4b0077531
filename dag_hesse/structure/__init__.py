"""What is provable before any FLOP: zero blocks, dead tensor parts, rank bounds, coupling (design §3, structure)."""

from dag_hesse.structure.analysis import Structure, analyze_structure

__all__ = ["Structure", "analyze_structure"]
