"""Bytes as messages and tables show them."""


def size_text(count: float) -> str:
    """Bytes in powers of ten, as disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
