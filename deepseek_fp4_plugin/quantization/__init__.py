"""FP8 checkpoint in, calibrated NVFP4 checkpoint out."""
