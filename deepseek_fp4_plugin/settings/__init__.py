"""The parts of config.py, one idea a file."""
