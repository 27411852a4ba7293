"""Automatic mixed precision, the same on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> dtype of autocast; None for none."""


@dataclass(frozen=True)
class Mixed:
    """``precision`` (fp32 | bf16 | fp16) on ``device``: the autocast context and the scaler of the gradients.

    fp16 needs the scaler, because its smallest gradients would be zero; bf16 has the range of float32 and does not.
    """

    precision: str
    device: torch.device

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass."""
        dtype = DTYPES[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler that is active for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
