"""The check of a width in bits, one for all who take one."""


def check_bits(name: str, bits: int) -> None:
    """Raises in the name of the argument."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"{name} must be in 1..8, got {bits}")
