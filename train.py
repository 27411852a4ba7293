"""Train a segmentation model: ``python train.py dataset=cityscapes loss=margin_calibration``; see README.md."""

from segkit.launch import main

if __name__ == "__main__":
    main()
