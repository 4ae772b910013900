"""Single requests to an object store, and what their outcomes mean.

Invariants:

* A request returns a value or a :class:`FailedRequest`; it raises nothing.
* A text of the store is shown as one printable line without secrets.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from kvcache.secrets import redact

T = TypeVar("T")

HEAD, GET, PUT, DELETE = "HEAD", "GET", "PUT", "DELETE"

NOT_SENT: Final = "NotSent"
TIMEOUT: Final = "Timeout"
UNREACHABLE: Final = "Unreachable"
"""Codes of failures without an answer of the store."""

NO_CREDENTIALS: Final = "NoCredentials"
CERTIFICATE: Final = "Certificate"  # of the server; it is invalid
FOLDER: Final = "Folder"  # an error of the file system
UNUSABLE: Final = "UnusableOptions"  # obstore cannot make a request of them

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9.]{1,80})\s*</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_CAUSES = re.compile(r'(?:message|error|source): "([^"\n]{1,300})"|\n\s+"(dns error)"')
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w{1,80})")
_NO_TLS = "InvalidContentType"  # the answer to a TLS greeting is no TLS
_TIMED_OUT = re.compile(r"kind: Timeout|\bTimedOut\b")
_BEING_WRITTEN = re.compile(r"<Code>(ConditionalRequestConflict|OperationAborted)</Code>")
_CONFLICT = "status code: 409"
_EXISTS = re.compile(r"<Code>\w*AlreadyExists</Code>")  # Azure's code for status 409
_REDIRECT = "Received redirect without LOCATION"  # S3: the bucket is in another region
_METADATA_SERVICES = ("://169.254.", "://metadata.google.internal")
"""Addresses at which a machine in the cloud finds its credentials, and other machines nothing."""
_CREDENTIAL_REQUEST = re.compile(
    r"token request|Error performing [A-Z]+ \S*"
    r"(://169\.254\.|://sts\.|/latest/api/token|/latest/meta-data/|/v2/credentials|/oauth2/)"
)
"""Begins the text about a request for credentials, which comes before the one to the store."""


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request without the outcome that it asked for.

    Attributes:
        code: the store's code, its status, or ``NOT_SENT``, ``TIMEOUT`` or ``UNREACHABLE``.
        text: the cause, for people.
        status: the HTTP status; 0 without an answer.
        missing: whether the store says that it has no such object.
    """

    code: str
    text: str
    status: int = 0
    missing: bool = False


class ForeignObject(int):
    """The size of an object that cannot be a block of the tier."""


class BufferGate:
    """Lets the requests of a call write into the caller's buffers until the call ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False

    def write(self, buffer: memoryview, data: memoryview) -> int:
        """Copy ``data`` to the start of ``buffer``; return its bytes.

        Raises:
            TimeoutError: the call has ended.
        """
        with self._lock:
            if self._closed:
                raise TimeoutError
            buffer[: data.nbytes] = data
            return data.nbytes

    def close(self) -> None:
        """Let no request write from now on."""
        with self._lock:
            self._closed = True


def head(store: Any, name: str) -> bool:
    """Return ``True``; a missing object raises."""
    obstore.head(store, name)
    return True


def get(store: Any, name: str, limit: int) -> obstore.Bytes | ForeignObject:
    """Return the bytes of an object of 1 to ``limit`` bytes; read none of a larger one."""
    answer = obstore.get(store, name)
    size = int(answer.meta["size"])
    return answer.bytes() if 0 < size <= limit else ForeignObject(size)


def load(store: Any, name: str, buffer: memoryview, gate: BufferGate) -> int:
    """Read an object into ``buffer``; return its bytes, or a :class:`ForeignObject`."""
    value = get(store, name, buffer.nbytes)
    return value if isinstance(value, ForeignObject) else gate.write(buffer, memoryview(value))


def put(store: Any, name: str, block: memoryview | bytes, *, overwrite: bool) -> bool:
    """Write an object with one request; without ``overwrite``, one that exists stays unchanged.

    Returns:
        whether the object exists now; ``False`` while another request is writing it.
    """
    try:
        obstore.put(
            store, name, block, mode="overwrite" if overwrite else "create", use_multipart=False
        )
    except (AlreadyExistsError, PreconditionError) as error:
        text = str(error)
        if _BEING_WRITTEN.search(text) and not overwrite:
            return False
        if overwrite or (_CONFLICT in text and not _EXISTS.search(text)):
            raise
    return True


def delete(store: Any, name: str) -> bool:
    """Delete an object."""
    obstore.delete(store, name)
    return True


def outcome_of(request: Callable[[], T], secrets: tuple[str, ...]) -> T | FailedRequest:
    """Return what ``request`` returns, or its failure."""
    try:
        return request()
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
        return failure_of(error, secrets)


def failure_of(error: BaseException, secrets: tuple[str, ...]) -> FailedRequest:
    """Return the failure for an exception of obstore.

    Its text is parsed, because many causes have the same type.
    """
    if not isinstance(error, Exception):
        return FailedRequest(
            UNUSABLE,
            "obstore cannot make a request of them; look for a line break or another character "
            "that does not belong in a credential, the region, the account or the endpoint",
        )
    summary, _, debug = str(error).partition("\n\nDebug source:")
    _, mark, cause = summary.partition(" - ")
    text = cause if mark else summary or type(error).__name__
    if summary.startswith("Generic LocalFileSystem"):
        return FailedRequest(FOLDER, redact(text, *secrets))
    found = _STATUS.search(summary)
    status = int(found[1]) if found else 301 if _REDIRECT in summary else _status_of(error)
    failure = _answered(status, text, summary) if status else _unanswered(text, debug)
    if _CREDENTIAL_REQUEST.search(summary):
        # Whether the store itself would answer is unknown.
        absent = 400 <= status < 500 or any(each in summary for each in _METADATA_SERVICES)
        text = f"found no credentials ({failure.text})"
        failure = FailedRequest(NO_CREDENTIALS if absent else UNREACHABLE, text)
    return replace(failure, text=redact(failure.text, *secrets))


def _unanswered(text: str, debug: str) -> FailedRequest:
    """Return the failure of a request that got no answer."""
    if _TIMED_OUT.search(debug):
        return FailedRequest(TIMEOUT, "no answer in time")
    if certificate := _CERTIFICATE.search(debug):
        text = f"the server's certificate is invalid: {certificate[1]}"
        return FailedRequest(CERTIFICATE, text)
    if _NO_TLS in debug:
        return FailedRequest(
            UNREACHABLE, "the server does not speak TLS; write http:// or its TLS port"
        )
    causes = [one or other for one, other in _CAUSES.findall(debug)]
    more = f": {causes[-1]}" if causes and causes[-1] not in text else ""
    return FailedRequest(UNREACHABLE, f"{text}{more}")


def _answered(status: int, text: str, summary: str) -> FailedRequest:
    """Return the failure of a request that got an answer with an error."""
    code, message = _CODE.search(summary), _MESSAGE.search(summary)
    if code:
        shown = f"{status} {code[1]} {message[1].strip() if message else ''}".rstrip()
    else:
        _, known, answer = text.partition("status code: ")
        shown = answer.rstrip(": ") if known else f"{status} {text}"
    name = code[1] if code else str(status)
    missing = status == 404 and name not in ("NoSuchBucket", "ContainerNotFound")
    return FailedRequest(name, shown, status, missing)


def _status_of(error: BaseException) -> int:
    """Return the HTTP status that an exception of obstore stands for; 0 for none."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, UnauthenticatedError):
        return 401
    return 403 if isinstance(error, PermissionDeniedError) else 0
