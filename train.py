"""Train a segmentation model: ``python train.py dataset=cityscapes loss=margin_calibration``; see README.md."""

import sys

try:
    from segkit.launch import main
except KeyboardInterrupt:  # Ctrl-C so early that nothing is there to handle it
    sys.exit(130)

if __name__ == "__main__":
    main()
