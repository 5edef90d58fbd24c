"""What a :class:`~gka_compile.layer.GatedKalmaNet` remembers of the tokens it has seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import GKAState

__all__ = ["GKACache"]


class GKACache(NamedTuple):
    """The cache of one layer for N sequences: tensors only, whose size does not depend on how many tokens came before."""

    conv: Tensor
    """[N, channels, conv_size − 1]: the last inputs of the convolution, oldest first, zero before the first token; in the dtype of
    the layer. The channels are those of q, then k, then v (v only where it is convolved)."""
    state: GKAState
    """H and U, float32 (float64 in a float64 layer)."""


torch.serialization.add_safe_globals([GKACache, GKAState])  # torch.load(weights_only=True) makes them
