"""The ``gka`` op family. Importing this package registers every op, its autograd and its FLOP formula."""

from . import autograd, flops, ops
from .ops import interpreting
from .reference import recurrent_gka

__all__ = ["autograd", "flops", "interpreting", "ops", "recurrent_gka"]
