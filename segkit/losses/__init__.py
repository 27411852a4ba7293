"""Losses for semantic segmentation; each keeps the contract that tests/losses/test_contract.py checks."""

from segkit.losses.checks import check_inputs, check_labels, lift_binary
from segkit.losses.diagnostics import LAMBDA_EDGES, add_sums, epsilon, margin_sums, summarise
from segkit.losses.iou_margin import IouMarginLoss
from segkit.losses.lovasz import LovaszSoftmaxLoss
from segkit.losses.margin_calibration import MarginCalibrationLoss, MarginOffsets, margin_calibration, margin_offsets
from segkit.losses.pixel_loss import at_label_size
from segkit.losses.pixelwise import CrossEntropyLoss, FocalLoss, OhemCrossEntropyLoss, class_weights, cross_entropy
from segkit.losses.region import DiceLoss, GeneralizedDiceLoss, JaccardMetricLoss, TverskyLoss
from segkit.losses.sum import SumLoss
from segkit.margins import margin_ratios

__all__ = [
    "LAMBDA_EDGES",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "IouMarginLoss",
    "JaccardMetricLoss",
    "LovaszSoftmaxLoss",
    "MarginCalibrationLoss",
    "MarginOffsets",
    "OhemCrossEntropyLoss",
    "SumLoss",
    "TverskyLoss",
    "add_sums",
    "at_label_size",
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
