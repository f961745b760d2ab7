"""Files that ship with the package: the embedded model r1_nano, its held-out problems, calibration text."""
