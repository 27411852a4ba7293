"""``segkit plot losses``: the rho-margin loss and the rho-calibrated log-loss over lambda.

The two panels are Figure 1 of Yu et al., IJCV 130(1), 2022, and what the code of the losses computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import check_writable, verb_parser
from segkit.errors import InputError
from segkit.files import written_beside
from segkit.progress import show

RHOS = (0.0, 0.5, 1.0, 2.0)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb's arguments."""
    made = verb_parser("plot", "Draw the losses of margin calibration.", example="losses --output losses.png")
    made.add_argument("what", choices=["losses"], help="losses: rho-margin loss and rho-calibrated log-loss")
    made.add_argument("--output", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    made.add_argument("--rho", type=float, nargs="+", default=list(RHOS), help="margins in logits (default: 0 0.5 1 2)")
    made.add_argument("--range", type=float, default=4.0, metavar="R", help="lambda from -R to R")
    return made


def run(argv: Sequence[str]) -> None:
    """Draw the curves and write the picture."""
    arguments = parser().parse_args(argv)
    check_writable(arguments, "output", makes_folders=True, draws=("output",))
    if not all(0 <= rho <= 1000 for rho in arguments.rho):
        given = " ".join(f"{rho:g}" for rho in arguments.rho)
        raise InputError(f"--rho is {given}, but a margin is a number of logits from 0 to 1000: give --rho 0 0.5 1 2")
    if not 0 < arguments.range <= 1000:
        raise InputError(
            f"--range is {arguments.range:g}, but must be a positive number of logits, at most 1000: give --range 4"
        )
    path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as temporary:
        draw(arguments.rho, arguments.range).savefig(temporary, dpi=200, format=path.suffix[1:].lower())
    show(f"written: {path}")


def margin_loss(lam: Any, rho: float) -> Any:
    """Return phi_rho of an array (P,) of margins, as ``rho_margin_loss`` of the diagnostics computes it."""
    import torch

    from segkit.losses.diagnostics import rho_margin_loss

    margins = torch.as_tensor(lam, dtype=torch.float64)
    return rho_margin_loss(margins, torch.tensor(float(rho), dtype=torch.float64)).numpy()


def calibrated_log_loss(lam: Any, rho: float) -> Any:
    """Return log2(1 + 2^(rho - lambda)) of an array (P,) of margins, as ``MarginCalibrationLoss`` computes it.

    The scores (lambda, 0) of two classes with the label 0 have the margin lambda, and both terms of the loss are
    then this function: the loss with both margins rho is twice what is wanted.
    """
    import numpy as np
    import torch

    from segkit.losses import MarginCalibrationLoss

    rhos = torch.full((2,), float(rho))
    loss = MarginCalibrationLoss(rho_k0=rhos, rho_0k=rhos, form="paper").double()
    scores = torch.tensor(np.stack([lam, np.zeros_like(lam)]), dtype=torch.float64)
    label = torch.zeros((1, 1, len(lam)), dtype=torch.int64)
    return loss.pixel_map(scores[None, :, None], label).numpy().reshape(-1) / 2


def draw(rhos: list[float], reach: float) -> Any:
    """Return the figure: one panel per loss, one curve per margin."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    lam = np.sort(np.append(np.linspace(-reach, reach, 401), 1e-9))  # so that the curve of rho = 0 has its step at 0
    shades = [(0.09, 0.29, 0.61, 0.25 + 0.75 * (i + 1) / len(rhos)) for i in range(len(rhos))]
    for rho, shade in zip(rhos, shades, strict=True):
        panels[0].plot(lam, margin_loss(lam, rho), color=shade, label=rf"$\rho = {rho:g}$")
        panels[1].plot(lam, calibrated_log_loss(lam, rho), color=shade, label=rf"$\rho = {rho:g}$")
    panels[0].set(title=r"$\rho$-margin loss", ylabel=r"$\Phi_\rho(\lambda)$", ylim=(-0.05, 1.25))
    panels[1].set(title=r"$\rho$-calibrated log-loss", ylabel=r"$\log_2(1 + 2^{\rho - \lambda})$")
    for panel in panels:
        panel.set_xlabel(r"$\lambda$")
        panel.spines[["top", "right"]].set_visible(False)
        panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.legend(frameon=False)
    return figure
