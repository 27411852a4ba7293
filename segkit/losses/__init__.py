"""Losses for semantic segmentation; each keeps the contract that tests/losses/test_contract.py checks."""

from segkit.losses.checks import check_inputs, check_labels, lift_binary
from segkit.losses.margin_calibration import MarginCalibrationLoss, margin_calibration
from segkit.losses.margins import MarginOffsets, margin_offsets
from segkit.losses.pixelwise import CrossEntropyLoss, class_weights, cross_entropy
from segkit.losses.upsampled import UpsampledLoss

__all__ = [
    "CrossEntropyLoss",
    "MarginCalibrationLoss",
    "MarginOffsets",
    "UpsampledLoss",
    "check_inputs",
    "check_labels",
    "class_weights",
    "cross_entropy",
    "lift_binary",
    "margin_calibration",
    "margin_offsets",
]
