"""The paper's statements, measured: Jacobians, bounds, decay, ranks, paths, negative curvature, K-FAC's error."""

from dag_hesse.theory.bounds import ResonanceBounds, resonance_bounds
from dag_hesse.theory.cut import CutBlock, cut_edges
from dag_hesse.theory.decay import DecayFit, decay_fit, interaction_radius
from dag_hesse.theory.jacobians import JacobianNorms, jacobian_norms
from dag_hesse.theory.kfac import BandError, band_errors
from dag_hesse.theory.kfac_blocks import KFACError, kfac_error
from dag_hesse.theory.negative import NegativeCurvature, negative_curvature
from dag_hesse.theory.network import resonance_graph
from dag_hesse.theory.paths import BlockPaths, StrongestPaths, block_paths, strongest_paths
from dag_hesse.theory.ranks import InteractionRanks, interaction_ranks
from dag_hesse.theory.second_derivatives import ActivationCurvature, activation_curvature
from dag_hesse.theory.skips import SkipPlacement, skip_placement
from dag_hesse.theory.spectra import BlockSpectra, block_spectra

__all__ = [
    "ActivationCurvature",
    "BandError",
    "BlockPaths",
    "BlockSpectra",
    "CutBlock",
    "DecayFit",
    "InteractionRanks",
    "JacobianNorms",
    "KFACError",
    "NegativeCurvature",
    "ResonanceBounds",
    "SkipPlacement",
    "StrongestPaths",
    "activation_curvature",
    "band_errors",
    "block_paths",
    "block_spectra",
    "cut_edges",
    "decay_fit",
    "interaction_radius",
    "interaction_ranks",
    "jacobian_norms",
    "kfac_error",
    "negative_curvature",
    "resonance_bounds",
    "resonance_graph",
    "skip_placement",
    "strongest_paths",
]
