"""segkit: semantic segmentation with distribution-aware margin calibration."""

__version__ = "0.1.0"
