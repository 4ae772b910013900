"""Sizes: valid ones are read exactly, and invalid ones are refused with the valid forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (1, 1),
        (123_456, 123_456),
        ("4096", 4096),
        ("7B", 7),
        ("3KB", 3_000),
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1TB", 10**12),
        ("3KiB", 3 << 10),
        ("512MiB", 512 << 20),
        ("10GiB", 10 << 30),
        ("2TiB", 2 << 40),
        ("1.5 GiB", 3 << 29),
        ("  10gib ", 10 << 30),
        ("10GIB", 10 << 30),
        ("0.1KB", 100),
        ("1.9B", 1),
        ("9007199254740993B", 2**53 + 1),  # a float would lose the last bit
        ("80%", 800),
        ("100 %", 1000),
        ("33.3%", 333),
        ("0.25%", 2),
    ],
)
def test_parse_size_of_a_valid_size_returns_bytes(written: object, nbytes: int) -> None:
    assert parse_size(written, whole=1000) == nbytes


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (0, "above zero"),
        (-1, "above zero"),
        ("0GiB", "above zero"),
        ("0%", "above zero"),
        ("-5GiB", "above zero"),
        ("-5%", "above zero"),
        ("0.4B", "above zero"),
        ("0.01%", "above zero"),
        (2**63, "at most 9223372036854775807"),
        ("9999999999999TiB", "at most 9223372036854775807"),
        ("9" * 5000, "at most 9223372036854775807"),
        ("100.1%", "above 100%"),
        ("", "not a size"),
        ("GiB", "not a size"),
        ("ten GiB", "not a size"),
        ("1,5GiB", "not a size"),
        (".5GiB", "not a size"),
        ("1e9", "not a size"),
        ("nan", "not a size"),
        ("10GiB 5MiB", "not a size"),
        ("٣GiB", "not a size"),
        (True, "not a size"),
        (1.5, "not a size"),
        (None, "not a size"),
        (["1GiB"], "not a size"),
        ("64G", "unknown unit 'g'"),
        ("10Gb/s", "not a size"),
        ("10PiB", "unknown unit 'pib'"),
    ],
)
def test_parse_size_of_an_invalid_size_raises(written: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_size(written, whole=1000)


def test_parse_size_error_names_the_valid_forms() -> None:
    for written in ("lots", "64G"):
        with pytest.raises(ValueError, match='write "10GiB", "512MB", "80%" or a whole number'):
            parse_size(written)


def test_parse_size_of_a_percentage_without_a_total_raises() -> None:
    with pytest.raises(ValueError, match="of an unknown total"):
        parse_size("80%")


@pytest.mark.parametrize(
    ("nbytes", "written"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536 << 20, "1.5GiB"),
        (100 << 30, "100GiB"),
        ((1 << 40) - 1, "1023.99GiB"),
        (1 << 40, "1TiB"),
        (5000 << 40, "5000TiB"),
        ((1 << 30) + (11 << 20), "1.01GiB"),
    ],
)
def test_format_size_uses_the_largest_unit(nbytes: int, written: str) -> None:
    assert format_size(nbytes) == written


@given(st.integers(1, 2**50))
def test_parse_size_of_a_formatted_size_is_slightly_smaller_at_most(nbytes: int) -> None:
    read = parse_size(format_size(nbytes))
    assert 0.99 * nbytes <= read <= nbytes
