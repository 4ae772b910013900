"""The JSON of ``--hicache-storage-backend-extra-config``: each error at the start."""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.connectors.sglang.options import StorageOptions, read_options

V1 = {"interface_v1": 1}
FACTORY = {"backend_name": "kvcache", "module_path": "m", "class_name": "C", **V1}


def test_options_of_sglang_are_no_options_of_the_backend() -> None:
    given = FACTORY | {"prefetch_threshold": 256, "tp_lcm_size": 8, "profile": " l1-disk"}
    assert read_options(given) == StorageOptions(" l1-disk")


def test_options_are_read() -> None:
    given = V1 | {"tiers": [{"name": "disk"}], "identity": " text "}
    assert read_options(given) == StorageOptions(None, ({"name": "disk"},), "text")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "interface_v1 must be 1"),
        ({"interface_v1": 0}, "interface_v1 must be 1"),
        (V1 | {"profil": "l1-disk"}, r'profil: no such option; .* did you mean "profile"'),
        (
            V1 | {"path": "x"},
            'path: no such option; the options are "profile", "tiers", "identity"',
        ),
        (V1 | {"profile": "a", "tiers": [{}]}, "profile and tiers exclude each other"),
        (V1 | {"profile": 3}, "profile is 3; it takes a name"),
        (V1 | {"profile": ""}, "profile is ''; it takes a name"),
        (V1 | {"tiers": {"name": "disk"}}, "tiers takes a list of objects"),
        (V1 | {"tiers": []}, "tiers takes a list of objects"),
        (V1 | {"tiers": ["disk"]}, "tiers takes a list of objects"),
        (V1 | {"identity": 7}, "identity is 7; it takes a text"),
    ],
)
def test_options_that_are_wrong_are_refused(given: dict[str, Any] | None, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_options(given)


def test_options_that_are_wrong_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"a: no such.*b: no such.*interface_v1"):
        read_options({"a": 1, "b": 2})
