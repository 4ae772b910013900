"""The tier on an object store: S3, Google Cloud Storage, Azure Blob Storage, or a folder.

All engines that reach the store share the blocks. ``names`` has the names of the
objects.

Invariants:

* A block is one object, written by one request, and by default only if no such object exists. So no
  block is stored in part, and of several engines that write a block only the first one has an
  effect.
* On the network a call ends within ``timeout_s``: no request begins in the second half of it, or
  takes longer than half of it. After a call no request uses the caller's memory: a ``BufferGate``
  keeps late answers out, and a store returns only after its last request has ended.
* An answer with an error for one object is a miss or a decline of that block, and is logged once
  for each code. A call in which the store served nothing raises ConnectionError.
* At most ``connections`` requests run at the same time, of all calls together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from functools import partial
from typing import Any, Final, Literal, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.inputs import check_timeout
from kvcache.keys import RESET_NBYTES, namespace_after_reset
from kvcache.process import bind_to_process
from kvcache.reasons import ReasonCounter
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.object import requests
from kvcache.tiers.object.location import open_location
from kvcache.tiers.object.names import START_NAME, block_name, description_name, reset_name
from kvcache.tiers.object.requests import (
    CERTIFICATE,
    DELETE,
    FOLDER,
    GET,
    HEAD,
    NO_CREDENTIALS,
    NOT_SENT,
    PUT,
    UNUSABLE,
    BufferGate,
    FailedRequest,
    ForeignObject,
)
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")

_BUSY_STATUSES: Final = (429, 503)
"""The statuses of a store that asks for fewer requests."""

_CREDENTIAL_OPTIONS: Final = {
    "s3": "access_key_env and secret_key_env",
    "gcs": "service_account_file",
    "azure": "account_key_env or sas_token_env",
}

_MAX_CONNECTIONS = 1024


class ObjectTier(Tier):
    """A tier on an object store.

    Args:
        url: ``s3://BUCKET[/PREFIX]``, ``gs://BUCKET[/PREFIX]``, ``az://CONTAINER[/PREFIX]``,
            ``file:///FOLDER``, or the absolute path of a folder. Without credentials.
        endpoint: the URL of a server that is not the provider's own; ``http://`` does not encrypt.
        region: the region of an S3 bucket; "" is ``AWS_REGION``, else us-east-1.
        account: the storage account of Azure; "" is ``AZURE_STORAGE_ACCOUNT_NAME``.
        access_key_env: the environment variable with the access key of S3. "" leaves the
            credentials to the provider's own variables, files and roles.
        secret_key_env: the environment variable with the secret of that key.
        session_token_env: the environment variable with its session token; "" is none.
        account_key_env: the environment variable with the key of Azure's account.
        sas_token_env: the environment variable with a shared access signature of Azure.
        service_account_file: the file of a service account of Google.
        ca_file: certificates to trust besides the system's.
        mode: ``"create"`` writes an object only if it does not exist; ``"overwrite"`` is for
            stores that reject such writes.
        connections: how many requests run at the same time.
        timeout_s: seconds after which a call ends; a request takes at most half of it.

    Raises:
        ValueError: an option is invalid, or the store rejects the tier. A store that cannot be
            reached is logged instead, because it may come back.
    """

    call_nbytes = 16 << 20

    def __init__(
        self,
        *,
        url: str,
        endpoint: str = "",
        region: str = "",
        account: str = "",
        access_key_env: str = "",
        secret_key_env: str = "",
        session_token_env: str = "",
        account_key_env: str = "",
        sas_token_env: str = "",
        service_account_file: str = "",
        ca_file: str = "",
        mode: Literal["create", "overwrite"] = "create",
        connections: int = 16,
        timeout_s: float = 5.0,
    ) -> None:
        if not 1 <= connections <= _MAX_CONNECTIONS:
            raise ValueError(f"connections is {connections}; it must be 1 to {_MAX_CONNECTIONS}")
        check_timeout(timeout_s)
        options = {
            "endpoint": endpoint, "region": region, "account": account,
            "access_key_env": access_key_env, "secret_key_env": secret_key_env,
            "session_token_env": session_token_env, "account_key_env": account_key_env,
            "sas_token_env": sas_token_env, "service_account_file": service_account_file,
            "ca_file": ca_file,
        }  # fmt: skip
        # A request that begins in the first half of a call ends before the call does.
        self._location = open_location(
            url, options, request_s=timeout_s / 2, connections=connections
        )
        self._timeout_s = timeout_s
        self._overwrite = mode == "overwrite"
        self._errors = ReasonCounter()  # by the kind of request and the code
        self._declined = ReasonCounter()
        self._unreachable = False
        self._log_lock = threading.Lock()
        self._closed = False
        self._threads = WorkerPool("object", connections)
        try:
            self._check_store()
        except BaseException:
            self.close()
            raise
        bind_to_process(self)

    def _check_store(self) -> None:
        """Raise ValueError if the store rejects the tier: its credentials, or the bucket."""
        get = partial(requests.get, self._location.store, START_NAME, RESET_NBYTES)
        outcomes = self._run(GET, [get])
        for failure in failures_among(GET, outcomes):
            if failure.code == UNUSABLE:
                raise ValueError(
                    f"url is {self._location.shown!r}, and its options cannot be used: "
                    f"{failure.text}"
                )
            status = failure.status
            rejected = 300 <= status < 500 and status not in _BUSY_STATUSES
            if rejected or failure.code in (NO_CREDENTIALS, CERTIFICATE):
                raise ValueError(
                    f"url is {self._location.shown!r}, but the object store rejects the tier: "
                    f"{failure.text}{_hint(failure, self._location.system)}"
                )
        self._observe(GET, outcomes)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """As the contract says; each key is one request."""
        store = self._location.store
        outcomes = self._request(HEAD, [partial(requests.head, store, block_name(k)) for k in keys])
        return [outcome is True for outcome in outcomes]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """As the contract says; an object that cannot be a block is removed, to store one."""
        gate, begun = BufferGate(), time.monotonic()
        loads = [
            partial(requests.load, self._location.store, block_name(key), buffer, gate)
            for key, buffer in zip(keys, into, strict=True)
        ]
        try:
            outcomes = self._request(GET, loads)
        finally:
            gate.close()
        foreign = [
            key
            for key, outcome in zip(keys, outcomes, strict=True)
            if isinstance(outcome, ForeignObject)
        ]
        in_time = time.monotonic() - begun < self._timeout_s / 2 or not self._location.host
        if foreign and in_time:  # otherwise the next load removes them
            with suppress(ConnectionError):  # the other blocks of this call are loaded
                self._delete(foreign, begun + self._timeout_s)
        return [outcome if type(outcome) is int else 0 for outcome in outcomes]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        first: dict[bytes, memoryview] = {}
        for key, block in zip(keys, blocks, strict=True):
            first.setdefault(key, block)
        puts = [
            partial(
                requests.put, self._location.store, block_name(key), block,
                overwrite=self._overwrite,
            )
            for key, block in first.items()
        ]  # fmt: skip
        outcomes = dict(zip(first, self._request(PUT, puts), strict=True))
        for key in keys:
            if isinstance(outcome := outcomes[key], FailedRequest):
                self._declined.add(outcome.code)
        return [outcomes[key] is True for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        self._delete(keys, time.monotonic() + self._timeout_s)

    def resolve(self, namespace: bytes, about: str) -> bytes:
        store = self._location.store
        get = partial(requests.get, store, reset_name(namespace), RESET_NBYTES)
        [outcome] = self._request(GET, [get])
        if isinstance(outcome, FailedRequest) and not outcome.missing:
            raise ConnectionError(f"cannot read whether the namespace was reset: {outcome.text}")
        reset = b"" if isinstance(outcome, FailedRequest | ForeignObject) else bytes(outcome)
        if isinstance(outcome, ForeignObject) or len(reset) not in (0, RESET_NBYTES):
            raise ConnectionError(
                "cannot read whether the namespace was reset: the object has another size"
            )
        resolved = namespace_after_reset(namespace, reset)
        if about:
            name = description_name(resolved)
            describe = partial(requests.put, store, name, about.encode(), overwrite=True)
            self._observe(PUT, self._run(PUT, [describe]))
        return resolved

    def forget(self, namespace: bytes) -> None:
        """As the contract says. Engines that run now still find the old blocks."""
        name, reset = reset_name(namespace), os.urandom(RESET_NBYTES)
        put = partial(requests.put, self._location.store, name, reset, overwrite=True)
        [outcome] = self._request(PUT, [put])
        if outcome is not True:
            text = outcome.text if isinstance(outcome, FailedRequest) else "no answer"
            raise ConnectionError(f"cannot write the reset: {text}")

    def usage(self) -> TierUsage:
        return TierUsage(declined_blocks=self._declined.counts())

    def close(self) -> None:
        self._closed = True  # queued requests are not sent
        self._threads.close(0.0)

    def _delete(self, keys: Sequence[bytes], deadline: float) -> None:
        """Delete the objects of ``keys``, until ``deadline`` at most."""
        store = self._location.store
        names = [block_name(key) for key in dict.fromkeys(keys)]
        self._request(DELETE, [partial(requests.delete, store, name) for name in names], deadline)

    def _request(
        self, verb: str, calls: Sequence[Callable[[], T]], deadline: float | None = None
    ) -> list[T | FailedRequest]:
        """Run requests; raise ConnectionError if the store served none of them."""
        outcomes = self._run(verb, calls, deadline)
        self._observe(verb, outcomes)
        failures = failures_among(verb, outcomes)
        served_none = bool(failures) and len(failures) == len(outcomes)
        if served_none and all(_serves_nothing(verb, failure) for failure in failures):
            raise ConnectionError(f"object store at {self._location.place}: {failures[0].text}")
        return outcomes

    def _run(
        self, verb: str, calls: Sequence[Callable[[], T]], deadline: float | None = None
    ) -> list[T | FailedRequest]:
        """Return the outcome of each request; they run at the same time, in threads.

        ``deadline``: when the call ends; ``None`` is ``timeout_s`` from now.
        """
        if not calls or self._closed:
            return [FailedRequest(NOT_SENT, "the tier is closed")] * len(calls)
        deadline = time.monotonic() + self._timeout_s if deadline is None else deadline
        last_start = deadline - self._timeout_s / 2
        late = FailedRequest(NOT_SENT, "no answer in time")  # or the tier is closed
        span = self._start_span(verb, len(calls))

        def send(call: Callable[[], T]) -> T | FailedRequest:
            too_late = time.monotonic() > last_start and self._location.host
            if too_late or self._closed:
                return late
            return requests.outcome_of(call, self._location.secrets)

        futures = [self._threads.submit(send, call) for call in calls]
        outcomes: list[T | FailedRequest] = []
        try:
            for future in futures:
                outcomes.append(self._wait(future, verb, deadline, late))  # noqa: PERF401
        finally:
            self._end_span(span, failures_among(verb, outcomes))
            if verb == PUT:
                wait(futures)  # they read the caller's memory
        return outcomes

    def _wait(
        self, future: Future[T | FailedRequest], verb: str, deadline: float, late: FailedRequest
    ) -> T | FailedRequest:
        """Return the outcome of a request; ``late`` for a read that has not ended by then."""
        # A folder has no deadline, as a disk has none. A write may still read the caller's memory.
        bounded = self._location.host and verb != PUT
        try:
            return future.result(max(0.0, deadline - time.monotonic()) if bounded else None)
        except FutureTimeoutError:
            future.cancel()
            return late
        except CancelledError:  # the tier was closed
            return late

    def _observe(self, verb: str, outcomes: Sequence[object]) -> None:
        """Log when the store stops to answer and when it answers again, and new error codes."""
        if not outcomes or self._closed:
            return
        failures = failures_among(verb, outcomes)
        answered = [each for each in failures if each.status or each.code == FOLDER]
        unreachable = len(failures) == len(outcomes) and not answered
        with self._log_lock:
            changed = unreachable != self._unreachable
            self._unreachable = unreachable
        if changed and unreachable:
            log.warning(
                "kvcache: object store at %s: unreachable (%s); its blocks count as misses until "
                "it recovers", self._location.place, failures[0].text,
            )  # fmt: skip
        elif changed:
            log.warning("kvcache: object store at %s: reachable again", self._location.place)
        for failure in answered:
            if self._errors.add(f"{verb} {failure.code}"):
                log.warning(
                    "kvcache: object store at %s: a %s request failed (%s); its blocks are "
                    "missed or declined", self._location.place, verb, failure.text,
                )  # fmt: skip

    def _start_span(self, verb: str, count: int) -> Span:
        """Start one span for all requests of a call."""
        parent = telemetry.current_span()
        if not parent.is_recording() or not self._location.host:
            return INVALID_SPAN
        attributes: dict[str, str | int] = {
            "http.request.method": verb,
            "server.address": self._location.host,
            "server.port": self._location.port,
            telemetry.OBJECT_REQUESTS: count,
        }
        return telemetry.start_client_child(parent, verb, attributes)

    def _end_span(self, span: Span, failures: Sequence[FailedRequest]) -> None:
        attributes: dict[str, Any] = {}
        if failures and failures[0].status:
            attributes["http.response.status_code"] = failures[0].status
        telemetry.end_span(span, attributes, error=failures[0].code if failures else None)


def failures_among(verb: str, outcomes: Sequence[object]) -> list[FailedRequest]:
    """Return the failures; that an object is missing is none, except for a write."""
    return [
        outcome
        for outcome in outcomes
        if isinstance(outcome, FailedRequest) and not (outcome.missing and verb != PUT)
    ]


def _serves_nothing(verb: str, failure: FailedRequest) -> bool:
    """Whether a failure means that further requests of this kind would fail too.

    A store that rejects writes (full, read-only) still serves reads, so that is a decline.
    """
    if verb in (HEAD, GET):
        return True
    return failure.code != FOLDER and (not failure.status or failure.status in _BUSY_STATUSES)


def _hint(failure: FailedRequest, system: str) -> str:
    """Return a remedy for the message about a store that rejects the tier."""
    if failure.code == NO_CREDENTIALS:
        return f"; set {_CREDENTIAL_OPTIONS[system]}, or the provider's own variables"
    if failure.code == CERTIFICATE:
        return "; ca_file takes the certificates to trust"
    if failure.status in (301, 307, 400) and system == "s3":
        return "; region must be that of the bucket"
    if failure.status == 403:
        return (
            "; the credentials need the right to read objects, and to list the bucket, without "
            "which a missing object is forbidden instead of missing"
        )
    return ""
