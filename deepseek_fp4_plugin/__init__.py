"""DeepSeek-R1/V3 in NVFP4: FP8 checkpoint in, NVFP4 checkpoint out, text out."""

__version__ = "0.1.0"
