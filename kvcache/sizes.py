"""Sizes in bytes as people write them: "10GiB", "512 MB", "80%".

Always true: a ``Size`` is a whole number of bytes above zero, and what ``format_size`` writes,
``parse_size`` reads back as no more than it was given.
"""

import re
from decimal import Decimal
from typing import NewType

Size = NewType("Size", int)
"""Bytes. A tier whose option has this type takes "10GiB" and "80%" in a profile."""

DiskSize = NewType("DiskSize", int)
"""Bytes of something else than memory. It takes what a ``Size`` takes but for percentages."""

FORMS = '"10GiB", "512MB", "80%" or a whole number of bytes'

_UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for ending, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgt", start=1)
}
_FORM = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*([a-z]*|%)")
_LARGEST = 2**63 - 1  # what a file offset can say


def parse_size(given: object, whole: int | None = None) -> Size:
    """The bytes of ``given``: an int, or a number with a unit: B, KB to TB, KiB to TiB.

    No unit is B. A percentage is of ``whole`` bytes, an error without. Fractions of a byte go.
    Raises ValueError that says what is allowed.
    """
    if type(given) is int:
        number, unit = Decimal(given), ""
    elif isinstance(given, str) and (form := _FORM.fullmatch(given.strip().lower())):
        number, unit = Decimal(form[1]), form[2]
    else:
        raise ValueError(f"not a size; write {FORMS}")
    if unit == "%":
        if whole is None:
            raise ValueError("a percentage of nothing known; write a size such as 10GiB")
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
