"""Read the objects of an object tier, for commands.

Invariant: every request, and every page of a list, has a deadline, and an object has at most the
bytes that the caller asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from kvcache.inputs import call_within

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcache.tiers.object.location import Location

T = TypeVar("T")

WAIT_S = 10.0
"""The longest wait for an answer, or for a page of a list."""
MAX_OBJECTS = 20_000_000
"""The most objects that are listed."""

_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object in a list. `modified` is the store's time."""

    name: str
    nbytes: int
    modified: datetime


class ObjectStore:
    """The objects below the prefix of a tier. Every method raises ValueError with the cause."""

    def __init__(self, location: Location) -> None:
        self._location = location

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Yield the objects below ``prefix``, in the order of the store."""
        obstore = import_module("obstore")
        pages = self._call(lambda: iter(obstore.list(self._location.store, prefix)))
        count = 0
        while page := self._call(lambda: next(pages, None)):
            for each in page:
                yield ListedObject(str(each["path"]), int(each["size"]), each["last_modified"])
            count += len(page)
            if count > MAX_OBJECTS:
                raise ValueError(f"{self._location.shown} lists more than {MAX_OBJECTS:,} objects")

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of an object; none if it is missing, empty or above ``limit`` bytes."""
        from kvcache.tiers.object import requests

        try:
            found = self._call(lambda: requests.get(self._location.store, name, limit))
        except FileNotFoundError:
            return b""
        return b"" if isinstance(found, requests.ForeignObject) else bytes(found)

    def write(self, name: str, value: bytes) -> ListedObject:
        """Write an object, and return it as the store lists it."""
        obstore = import_module("obstore")
        store = self._location.store
        self._call(lambda: obstore.put(store, name, value, use_multipart=False))
        found = self._call(lambda: obstore.head(store, name))
        return ListedObject(name, int(found["size"]), found["last_modified"])

    def delete(self, name: str) -> None:
        """Delete an object."""
        obstore = import_module("obstore")
        self._call(lambda: obstore.delete(self._location.store, name))

    def _call(self, request: Callable[[], T]) -> T:
        """Return the result of a request. A missing object raises FileNotFoundError."""
        from kvcache.tiers.object.requests import failure_of

        try:
            return call_within(WAIT_S, request)
        except TimeoutError:
            text = f"no answer in {WAIT_S:g} s"
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            failure = failure_of(error, self._location.secrets)
            if failure.missing:
                raise FileNotFoundError(failure.text) from None
            text = failure.text
        raise ValueError(f"{self._location.shown} cannot be read: {text}")


def open_store(options: Mapping[str, Any]) -> ObjectStore:
    """Return the store of a tier's options, with the tier's defaults for missing ones.

    Raises:
        ValueError: an option is invalid, or a package is missing.
    """
    try:
        from kvcache.tiers.object.location import OPTIONS, open_location
    except ImportError as error:
        raise ValueError(
            f"object stores need packages: pip install 'kvcache[object]' ({error})"
        ) from error
    given = {name: str(options[name]) for name in OPTIONS if name in options}
    return ObjectStore(
        open_location(str(options["url"]), given, request_s=WAIT_S, connections=_CONNECTIONS)
    )
