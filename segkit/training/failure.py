"""Failure bundles: everything that a failed step needs to be repeated elsewhere, and the look at it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.files import write_json
from segkit.runtime import derive_seed
from segkit.training.precision import Mixed

COUNTS = "label_counts.json"


@dataclass(frozen=True, kw_only=True)
class Where:
    """The step that failed: ``step`` is the number of steps of ``phase`` before it."""

    phase: str
    step: int
    rank: int = 0

    def seed(self, seed: int) -> int:
        """The seed of dropout in this step, for the run's ``seed``."""
        return derive_seed(seed, self.phase, self.step, self.rank)


def save_bundle(
    folder: Path,
    where: Where,
    *,
    error: BaseException,
    names: Sequence[str],
    config: dict[str, Any],
    batch: Any = None,
    state: dict[str, Any] | None = None,
    findings: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/failure-STEP/`` (of a rank other than 0: ``failure-STEP-rankR/``) and return it.

    error.json: the error, the phase, the number of steps before the failed one, the rank, the samples' names and the
    ``findings`` of :func:`examine`; config.json; label_counts.json, which the loss may need; batch.pt: images
    (N, C, H, W), labels uint8 (N, H, W), names, indices, where they could be read; state.pt: what a checkpoint holds,
    from before the failed step.
    """
    bundle = folder / (f"failure-{where.step:07d}" + (f"-rank{where.rank}" if where.rank else ""))
    bundle.mkdir(parents=True, exist_ok=True)
    what = {"kind": type(error).__name__, "error": str(error), **asdict(where)}
    write_json(bundle / "error.json", {**what, "names": list(names), "findings": findings})
    write_json(bundle / "config.json", config)
    if (folder / COUNTS).is_file():
        shutil.copy(folder / COUNTS, bundle / COUNTS)
    if batch is not None:
        content = {"images": batch.images, "labels": batch.labels}
        torch.save({**content, "names": list(batch.names), "indices": list(batch.indices)}, bundle / "batch.pt")
    if state is not None:
        torch.save(state, bundle / "state.pt")
    return bundle


def smaller_steps(config: Mapping[str, Any], phase: str) -> str:
    """The advice to lower what makes the steps of ``phase`` large: factors of ``config`` above 1000 first."""
    large = "".join(f"{key} ({value:g}), " for key, value in _factors(config) if value > 1000)
    return f"lower {large}optimizer.lr (schedule.{phase}.lr where that is set)"


def _factors(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(key, value) of each factor of learning rates, and of each weight of a term of a loss."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _factors(value, f"{prefix}{name}.")
        elif type(value) in (int, float) and (name in ("encoder_lr_factor", "weight") or prefix == "lr_factors."):
            yield f"{prefix}{name}", value


def examine(model: nn.Module, loss: nn.Module, batch: Any, *, mixed: Mixed, seed: int) -> dict[str, Any]:
    """Repeat forward and backward of a step on the whole ``batch`` and describe them as plain values.

    ``loss``, ``terms`` (of a sum of losses), ``logits`` (least, greatest, how many are not finite),
    ``first_non_finite_module`` (in the order of the forward pass) and ``first_non_finite_gradient`` (in the order of
    the parameters), None where all is finite; ``gradient_norms`` of the model's parts and ``gradient_norm`` of all.
    The weights are not changed; the gradients and the running statistics are.
    """
    torch.manual_seed(seed)
    model.train()
    model.zero_grad(set_to_none=True)
    images, target = batch.images.to(mixed.device), batch.labels.to(mixed.device).long()
    with _first_non_finite(model) as culprits, mixed.autocast():
        logits = model(images)
    with torch.no_grad():
        terms = {name: float(value) for name, value in _terms(loss, logits, target)}
    value = loss(logits, target)
    value.backward()
    gradients = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    norms: dict[str, float] = {}
    for name, gradient in gradients.items():
        part = ".".join(name.split(".")[:2])
        norms[part] = math.hypot(norms.get(part, 0.0), float(gradient.float().norm()))
    logits = logits.detach()
    finite = torch.isfinite(logits)
    return {
        "loss": float(value.detach()),
        "terms": terms,
        "logits": {
            "least": float(logits[finite].min()) if bool(finite.any()) else None,
            "greatest": float(logits[finite].max()) if bool(finite.any()) else None,
            "not_finite": int((~finite).sum()),
        },
        "first_non_finite_module": culprits[0] if culprits else None,
        "first_non_finite_gradient": bad[0] if bad else None,
        "gradient_norms": norms,
        "gradient_norm": math.hypot(*norms.values()),
    }


@contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list to which the names of modules with a non-finite output are added as they run."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _terms(loss: Any, logits: Tensor, target: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of each term of a weighted sum, without its weight; of the loss itself if it is no sum."""
    terms = getattr(loss, "losses", None)
    for name, term in terms.items() if isinstance(terms, nn.ModuleDict) else [(type(loss).__name__, loss)]:
        yield name, term(logits, target)
