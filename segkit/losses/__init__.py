"""Losses for semantic segmentation; each keeps the contract that tests/losses/test_contract.py checks."""

from segkit.losses.checks import check_inputs, check_labels, lift_binary
from segkit.losses.diagnostics import LAMBDA_EDGES, epsilon, margin_sums, summarise
from segkit.losses.lovasz import LovaszSoftmaxLoss
from segkit.losses.margin_calibration import MarginCalibrationLoss, MarginOffsets, margin_calibration, margin_offsets
from segkit.losses.observed import ObservedLoss, add_sums
from segkit.losses.pixelwise import CrossEntropyLoss, FocalLoss, OhemCrossEntropyLoss, class_weights, cross_entropy
from segkit.losses.region import DiceLoss, GeneralizedDiceLoss, JaccardMetricLoss, TverskyLoss
from segkit.losses.sum import SumLoss
from segkit.losses.upsampled import UpsampledLoss
from segkit.margins import margin_ratios

__all__ = [
    "LAMBDA_EDGES",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "JaccardMetricLoss",
    "LovaszSoftmaxLoss",
    "MarginCalibrationLoss",
    "MarginOffsets",
    "ObservedLoss",
    "OhemCrossEntropyLoss",
    "SumLoss",
    "TverskyLoss",
    "UpsampledLoss",
    "add_sums",
    "check_inputs",
    "check_labels",
    "class_weights",
    "cross_entropy",
    "epsilon",
    "lift_binary",
    "margin_calibration",
    "margin_offsets",
    "margin_ratios",
    "margin_sums",
    "summarise",
]
