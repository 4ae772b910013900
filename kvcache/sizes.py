"""Sizes in bytes as people write them: "10GiB", "512 MB", "80%".

Invariants: a ``Size`` is a whole number of bytes above zero. ``parse_size`` reads the output of
``format_size`` as at most the formatted number.
"""

import re
from decimal import Decimal
from typing import NewType

Size = NewType("Size", int)
"""Bytes of memory. In a profile, an option of this type takes "10GiB" and "80%"."""

DiskSize = NewType("DiskSize", int)
"""Bytes of a disk. In a profile, an option of this type takes "10GiB", but no percentage."""

FORMS = '"10GiB", "512MB", "80%" or a whole number of bytes'

_UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for ending, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgt", start=1)
}
_FORM = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*([a-z]*|%)")
_LARGEST = 2**63 - 1  # the largest file offset


def parse_size(given: object, whole: int | None = None) -> Size:
    """Convert an int, or a number with a unit (B, KB to TB, KiB to TiB), to bytes.

    Args:
        given: the size. Without a unit it is in bytes. A fraction of a byte is dropped.
        whole: the bytes that a percentage refers to; ``None`` refuses percentages.

    Raises:
        ValueError: if it is not such a size.
    """
    if type(given) is int:
        number, unit = Decimal(given), ""
    elif isinstance(given, str) and (form := _FORM.fullmatch(given.strip().lower())):
        number, unit = Decimal(form[1]), form[2]
    else:
        raise ValueError(f"not a size; write {FORMS}")
    if unit == "%":
        if whole is None:
            raise ValueError("a percentage of an unknown total; write a size such as 10GiB")
        if number > 100:
            raise ValueError("a percentage above 100%")
        nbytes = int(number * whole / 100)
    elif unit in _UNITS:
        nbytes = int(number * _UNITS[unit])
    else:
        raise ValueError(f"unknown unit {unit!r}; write {FORMS}; units are B, KB to TB, KiB to TiB")
    if not 0 < nbytes <= _LARGEST:
        raise ValueError(f"a size must be above zero and at most {_LARGEST} bytes")
    return Size(nbytes)


def format_size(nbytes: int) -> str:
    """``nbytes`` in the largest binary unit it fills, rounded down to hundredths: "1.5GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        size = _UNITS[unit.lower()]
        if nbytes >= size:
            whole, hundredths = divmod(nbytes * 100 // size, 100)
            return f"{whole}.{hundredths:02}".rstrip("0").rstrip(".") + unit
    return f"{nbytes}B"
