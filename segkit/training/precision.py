"""Automatic mixed precision, the same on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Mixed:
    """``precision`` (fp32 | bf16 | fp16) on ``device``: the autocast context and the scaler of the gradients.

    fp16 needs the scaler, because its smallest gradients would be zero; bf16 has the range of float32 and does not.
    """

    precision: str
    device: torch.device

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler that is active for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
