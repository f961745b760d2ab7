"""The one exception for a checkpoint that cannot be used: its message says what, where and what to do."""


class CheckpointError(ValueError):
    """A missing, damaged or inconsistent checkpoint. The command line prints the message and exits with status 1."""
