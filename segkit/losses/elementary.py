"""Elementary functions that keep their accuracy near 0, from those that torch computes in full vectors.

On a CPU with AVX-512 ``torch.log1p``, ``expm1`` and ``softplus`` take 10 ns a number, ``log`` and ``exp2`` below 1.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)


def log1p(q: Tensor) -> Tensor:
    """log(1 + q) of finite q >= 0.

    With u = 1 + q as it is rounded, log(1 + q) = log(u) + log(1 + r) with r = (q - (u - 1)) / u, which is below the
    last bit of 1: log(1 + r) is r.
    """
    u = q + 1
    return u.log() + (q - (u - 1)) / u


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of any x."""
    if x.device.type != "cpu":
        return F.softplus(x, threshold=60.0)  # beyond which float64 cannot tell it from x
    return x.relu() + log1p((x.abs() * -LOG2_E).exp2())


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 of x <= 0: with t = tanh(x / 2) it is 2 t / (1 - t)."""
    t = (x / 2).tanh()
    return 2 * t / (1 - t)
