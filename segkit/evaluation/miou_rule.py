"""The decision that maximises the mean IoU of a whole data set, from calibrated probabilities.

With C_jk the share of pixels of class j that are predicted as k, U_k = C_k. + C_.k - C_kk the share of the union and
I_k = C_kk / U_k, the first-order change of the mean IoU by predicting k at one pixel of posterior p is

    d mIoU = ((1 + I_k) p_k - I_k) / (K U_k)

(from dI_k = (dC_kk U_k - C_kk dU_k) / U_k^2 with dC_kk = p_k and dU_k = 1 - p_k). So the best decision is a fixed
point:

    y = argmax_k ((1 + I_k) p_k - I_k) / U_k                                                          (*)

Against "not k" its threshold is I_k / (1 + I_k), at most one half: the harder a class, the more readily it is
predicted. The same follows for any ratio of counts: the best classifier for it solves a cost-sensitive problem (Koyejo
et al., NeurIPS 2014; Narasimhan et al., ICML 2015; for F1, Lipton et al., 2014).

The rule needs calibrated probabilities, so a factor and an offset per class (vector scaling; Guo et al., ICML 2017) are
fitted by likelihood first. What is fitted must not be scored: use `dataset.holdout`, or other images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.errors import MOST_NUMBER, InputError
from segkit.evaluation.decision import LogitSample
from segkit.evaluation.metrics import Floats, divide

FLOOR = 0.05
"""Least I_k: below it a class would be predicted almost everywhere for the sake of a figure that is mostly noise."""
DAMPING = 0.5
NUM_ROUNDS = 60


@dataclass(frozen=True)
class MiouRule:
    """Rule (*) after vector scaling, K numbers each. ``counted``: classes with target pixels where it was fitted.

    The others keep the pixels at which they have the largest probability: nothing was learnt about them.
    """

    factor: Floats
    offset: Floats
    iou: Floats
    union: Floats
    counted: NDArray[np.bool_]

    def calibrated(self, logits: Tensor) -> Tensor:
        """Return logits (N, K, ..) with the factor and the offset of each class, in float32."""
        shape = (1, -1, *[1] * (logits.dim() - 2))
        factor, offset = (
            torch.as_tensor(values, dtype=torch.float32, device=logits.device).view(shape)
            for values in (self.factor, self.offset)
        )
        return logits.float() * factor + offset

    def scores(self, probabilities: Tensor) -> Tensor:
        """Return what (*) takes the argmax of, for calibrated ``probabilities`` (N, K, ..): finite float32 values.

        A class that is not counted gets a score above all others where it is the most probable one, and one below all
        others elsewhere.
        """
        shape = (1, -1, *[1] * (probabilities.dim() - 2))
        # In a graph that is exported, the numbers must be float32 constants.
        columns = (np.where(self.counted, self.iou, 0), 1 / np.where(self.counted, self.union, 1), self.counted)
        iou, inverse, counted = (
            torch.as_tensor(values.astype(np.float32), device=probabilities.device).view(shape) for values in columns
        )
        scores = ((1 + iou) * probabilities - iou) * inverse
        if self.counted.all():
            return scores
        beyond = 2 * float(columns[1].max())  # a score of a counted class lies between -1 / U_k and 1 / U_k
        kept = torch.where(probabilities == probabilities.amax(1, keepdim=True), beyond, -beyond)
        return torch.where(counted > 0, scores, kept)

    def decide(self, logits: Tensor) -> Tensor:
        """Return the scores of plain ``logits`` (N, K, ..): `calibrated`, softmax, `scores`."""
        return self.scores(self.calibrated(logits).softmax(1))

    def to_json(self, class_names: Sequence[str]) -> dict[str, dict[str, float | bool]]:
        """Return class name -> the numbers of the class."""
        rows = zip(class_names, self.factor, self.offset, self.iou, self.union, self.counted, strict=True)
        return {
            name: {"factor": float(a), "offset": float(b), "iou": float(i), "union": float(u), "counted": bool(c)}
            for name, a, b, i, u, c in rows
        }


def rule_from_json(content: Any, class_names: Sequence[str]) -> MiouRule:
    """Return the rule of :meth:`MiouRule.to_json`; InputError if it is one of other classes, or no rule at all."""
    try:
        rows = [content[name] for name in class_names]
        columns = [np.array([row[key] for row in rows]) for key in ("factor", "offset", "iou", "union", "counted")]
        kinds = "".join(column.dtype.kind for column in columns)
        whole = len(content) == len(class_names) and kinds[-1] == "b" and set(kinds[:-1]) <= set("if")
        whole = whole and all((np.abs(column) <= MOST_NUMBER).all() for column in columns)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not isinstance(content, Mapping) or not whole or not (columns[3] > 0).all():
        raise InputError(
            "the stored decision is none of this run's classes: fit it again with "
            "`segkit evaluate RUN --decision miou --refit`"
        )
    return MiouRule(*columns)


class ScaledModel(nn.Module):
    """``model`` with the vector scaling of ``rule`` on its logits, which are interpolated and averaged afterwards."""

    def __init__(self, model: nn.Module, rule: MiouRule) -> None:
        super().__init__()
        self.model, self.rule = model, rule

    def forward(self, images: Tensor) -> Tensor:
        """Calibrated logits (N, K, h, w) in float32."""
        return self.rule.calibrated(self.model(images))


@dataclass(frozen=True)
class FittedRule:
    """The rule, and the mean IoU on the sample of the argmax and of the rule (over the classes that it holds)."""

    rule: MiouRule
    mean_iou_before: float
    mean_iou_after: float


def fit_miou_rule(sample: LogitSample) -> FittedRule:
    """Fit vector scaling by likelihood, then rule (*) by a damped fixed-point iteration, on ``sample``."""
    num_classes = sample.logits.shape[1]
    factor, offset = fit_vector_scaling(sample)
    logits = sample.logits.astype(np.float64)
    joint = np.zeros(logits.shape)
    joint[np.arange(len(joint)), sample.target] = sample.weights
    plain = _counts(logits.argmax(1), joint)
    before = _mean_iou(plain)
    iou, union, after = fixed_point(_softmax(logits * factor + offset), joint)
    counted = plain.sum(1) > 0
    if after <= before:  # no iterate is better: the argmax of the plain logits, as a rule that changes nothing
        zeros, ones = np.zeros(num_classes), np.ones(num_classes)
        return FittedRule(MiouRule(ones, zeros, zeros, ones, counted), before, before)
    return FittedRule(MiouRule(factor, offset, iou, union, counted), before, after)


def fixed_point(probabilities: Floats, joint: Floats) -> tuple[Floats, Floats, float]:
    """Return I (K,), U (K,) of rule (*), and its mean IoU, for ``probabilities`` (P, K).

    ``joint`` (P, K): the mass of each class at each of the P places. Starts from the argmax, averages I and U with
    those of each new decision, and returns the iterate whose decision has the largest mean IoU; I is at least `FLOOR`.
    """
    joint = joint / joint.sum()
    largest = probabilities.argmax(1)
    counts = _counts(largest, joint)
    present = joint.sum(0) > 0
    iou, union = _iou_and_union(counts)
    best = np.zeros_like(iou), np.ones_like(union), _mean_iou(counts)
    for _ in range(NUM_ROUNDS):
        scores = np.where(present, ((1 + iou) * probabilities - iou) / union, -np.inf)
        decision = np.where(present[largest], scores.argmax(1), largest)
        counts = _counts(decision, joint)
        score = _mean_iou(counts)
        if score > best[2]:
            best = iou.copy(), union.copy(), score
        new_iou, new_union = _iou_and_union(counts)
        iou += DAMPING * (new_iou - iou)
        union += DAMPING * (new_union - union)
    return best


def fit_vector_scaling(sample: LogitSample) -> tuple[Floats, Floats]:
    """Return the factor and the offset (K,) that minimise the weighted cross-entropy of factor * logits + offset.

    A class without target pixels keeps the factor 1 and the offset 0. Factors stay positive: their logarithm is fitted.
    """
    logits, target = torch.from_numpy(sample.logits).double(), torch.from_numpy(sample.target)
    weights = torch.from_numpy(sample.weights / sample.weights.sum())
    present = torch.bincount(target, minlength=logits.shape[1]) > 0
    parameters = torch.zeros(2, logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_factor, offset = torch.where(present, parameters, 0.0)
        scaled = logits * log_factor.exp() + offset
        value = (weights * torch.nn.functional.cross_entropy(scaled, target, reduction="none")).sum()
        value.backward()
        return value

    optimizer.step(loss)
    log_factor, offset = torch.where(present, parameters, 0.0).detach()
    return log_factor.exp().numpy(), offset.numpy()


def _softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def _counts(decision: NDArray[np.integer], joint: Floats) -> Floats:
    """Return the matrix C (K, K), rows = target, of deciding ``decision`` (P,) where ``joint`` (P, K) is the mass."""
    counts = np.zeros((joint.shape[1], joint.shape[1]))
    np.add.at(counts.T, decision, joint)
    return counts


def _iou_and_union(counts: Floats) -> tuple[Floats, Floats]:
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = np.maximum(np.nan_to_num(divide(np.diag(counts), union)), FLOOR)
    return iou, np.maximum(union, np.finfo(float).tiny)


def _mean_iou(counts: Floats) -> float:
    """Mean IoU over the classes with target pixels."""
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    return float(divide(np.diag(counts), union)[counts.sum(1) > 0].mean())
