"""Checks a tier's options, and opens obstore's client of a bucket, a container or a folder.

Invariants:

* A secret is read from the environment, and is in no message, log or ``repr``. A URL that may
  contain one is refused, and not repeated.
* Requests are encrypted, unless the endpoint itself begins with ``http://``.
* obstore repeats no request: a call has one deadline, and a failed request is a miss.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from kvcache.inputs import check_files
from kvcache.secrets import read_secret, redact, with_value

FORMS: Final = (
    "s3://BUCKET[/PREFIX], gs://BUCKET[/PREFIX], az://CONTAINER[/PREFIX], "
    "file:///FOLDER or the absolute path of a folder"
)

_OPTIONS_OF: Final = {
    "s3": ("endpoint", "region", "access_key_env", "secret_key_env", "session_token_env"),
    "gs": ("endpoint", "service_account_file"),
    "az": ("endpoint", "account", "account_key_env", "sas_token_env"),
    "file": (),
}
"""The options of each scheme; those with ``endpoint`` also take ``ca_file``."""

OPTIONS: Final = tuple(sorted({"ca_file"}.union(*_OPTIONS_OF.values())))
"""Every option that :func:`open_location` takes."""

_SYSTEMS: Final = {"s3": "s3", "gs": "gcs", "az": "azure", "file": "file"}

_HOSTS: Final = {
    "s3": "s3.{region}.amazonaws.com",
    "gs": "storage.googleapis.com",
    "az": "{account}.blob.core.windows.net",
}

_ENDPOINT_VARIABLES: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""The variables from which obstore reads an endpoint."""

_SECRET_VARIABLES: Final = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_TOKEN",
    "GOOGLE_BEARER_TOKEN",
)  # fmt: skip
"""Variables of the providers with secrets, which no message may repeat."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX = re.compile(r"(?!\.{1,2}(/|$))[\w.=+-]+(/(?!\.{1,2}(/|$))[\w.=+-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """An open client, and its place.

    Attributes:
        store: obstore's client; the names of its objects begin below the prefix.
        shown: the URL, for messages.
        system: ``"s3"``, ``"gcs"``, ``"azure"`` or ``"file"``.
        host: the host that answers; "" for a folder.
        port: its port.
        secrets: texts that no message may repeat.
    """

    store: Any
    shown: str
    system: str
    host: str
    port: int
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def place(self) -> str:
        """The URL and the host that answers, for messages about the server."""
        return f"{self.shown} ({self.host}:{self.port})" if self.host else self.shown


def open_location(
    url: str, options: dict[str, str], *, request_s: float, connections: int
) -> Location:
    """Return the open client of ``url``. It sends nothing.

    Args:
        url: one of ``FORMS``.
        options: the options of :class:`ObjectTier` that depend on the scheme, "" if not set.
        request_s: seconds after which a request fails.
        connections: how many idle connections are kept.

    Raises:
        ValueError: an option is invalid.
    """
    scheme, name, prefix = parse_url(url)
    given = {option: value for option, value in options.items() if value}
    allowed = _OPTIONS_OF[scheme] + (("ca_file",) if scheme != "file" else ())
    for option in given:
        if option not in allowed:
            owners = [each for each in _OPTIONS_OF if option in (*_OPTIONS_OF[each], "ca_file")]
            schemes = " or ".join(f"{each}://" for each in owners if each != "file")
            raise ValueError(f"{option} is for a url that begins with {schemes}")
    if scheme == "file":
        return Location(_open_folder(Path(name)), name, _SYSTEMS[scheme], "", 0)
    if ("access_key_env" in given) != ("secret_key_env" in given):
        raise ValueError(
            "access_key_env and secret_key_env are set together, or neither: without them the "
            "provider's own variables and roles apply"
        )
    check_files(
        ca_file=given.get("ca_file", ""),
        service_account_file=given.get("service_account_file", ""),
    )
    secrets = {
        option: read_secret(variable, option)
        for option, variable in given.items()
        if option.endswith("_env")
    }
    for option, value in (given | secrets).items():
        if not value.isprintable():
            raise ValueError(f"{option} contains a line break, or another unprintable character")
    known = [os.environ.get(variable, "") for variable in _SECRET_VARIABLES]
    hidden = (*secrets.values(), *filter(None, known))
    endpoint = _endpoint(scheme, given.get("endpoint", ""))
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=request_s),
        "connect_timeout": timedelta(seconds=request_s),
        "pool_max_idle_per_host": str(connections),
        "allow_http": endpoint.startswith("http://"),
    }
    if "ca_file" in given:
        if not endpoint.startswith("https://") and endpoint:
            raise ValueError("ca_file is for an endpoint that begins with https://")
        client["root_certificate"] = Path(given["ca_file"]).read_bytes()
    arguments = {
        "prefix": prefix or None,
        "client_options": client,
        "retry_config": {"max_retries": 0},
        **_credentials(scheme, given, secrets, endpoint),
    }
    opener: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        store = opener(name, **arguments)
    except Exception as error:  # noqa: BLE001 - obstore raises several kinds
        text = redact(str(error).partition("\n\nDebug")[0], *hidden)
        raise ValueError(f"url is {url!r}, and its options cannot be used: {text}") from None
    host, port = _address(scheme, endpoint, given)
    return Location(store, url.rstrip("/"), _SYSTEMS[scheme], host, port, hidden)


def parse_url(url: str) -> tuple[str, str, str]:
    """Return the scheme, the bucket (or container, or folder), and the prefix of ``url``.

    Raises:
        ValueError: ``url`` is invalid; the message contains nothing that may be a secret.
    """
    if "://" not in url:
        if not url.startswith("/") or "\0" in url:
            raise ValueError(f"{with_value('url', url)} names no object store; write {FORMS}")
        return "file", os.path.normpath(url), ""
    if any(mark in url for mark in "?#@"):
        raise ValueError(
            "url contains a user, a password or parameters; credentials come from the environment: "
            f"write {FORMS}"
        )
    scheme, _, rest = url.partition("://")
    if scheme not in _OPTIONS_OF:
        raise ValueError(f"url begins with {scheme + ':'!r}; write {FORMS}")
    if scheme == "file":
        folder = unquote(rest)
        if not folder.startswith("/") or "\0" in folder:
            raise ValueError(f"url is {url!r}, which names no absolute path; write {FORMS}")
        return scheme, os.path.normpath(folder), ""
    name, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not _NAME.fullmatch(name):
        raise ValueError(f"url is {url!r}, which names no bucket or container; write {FORMS}")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"url is {url!r}; a prefix has letters, digits and . _ - = + between single slashes"
        )
    return scheme, name, prefix


def _endpoint(scheme: str, option: str) -> str:
    """Return the endpoint of the option, else of the provider's variables; "" for neither."""
    found = {"endpoint": option} | {
        variable: os.environ.get(variable, "") for variable in _ENDPOINT_VARIABLES[scheme]
    }
    place, endpoint = next(
        ((place, value) for place, value in found.items() if value), ("endpoint", "")
    )
    try:
        parts = urlsplit(endpoint)
        valid = bool(parts.hostname) and parts.port != 0 and not set("?#@ ") & set(endpoint)
        valid = valid and endpoint.isprintable() and endpoint.isascii()  # obstore would panic
    except ValueError:
        valid = False
    if endpoint and not (valid and endpoint.startswith(("http://", "https://"))):
        raise ValueError(
            f"{with_value(place, endpoint)} is no http:// or https:// URL of a server; "
            "write https://HOST[:PORT]"
        )
    return endpoint.rstrip("/")


def _credentials(
    scheme: str, given: dict[str, str], secrets: dict[str, str], endpoint: str
) -> dict[str, Any]:
    """Return obstore's arguments for one scheme, without those that are not set."""
    arguments: dict[str, Any]
    if scheme == "s3":
        unsigned = not endpoint.startswith("http://") and not os.environ.get("AWS_UNSIGNED_PAYLOAD")
        arguments = {
            "endpoint": endpoint,
            "region": given.get("region"),
            "access_key_id": secrets.get("access_key_env"),
            "secret_access_key": secrets.get("secret_key_env"),
            "session_token": secrets.get("session_token_env"),
            # TLS protects the block on its way, so a second digest of it would cost CPU only.
            "unsigned_payload": unsigned or None,
            # Some stores do not implement the request that deletes several objects.
            "disable_bulk_delete": True,
        }
    elif scheme == "gs":
        arguments = {"base_url": endpoint, "service_account": given.get("service_account_file")}
    else:
        arguments = {
            "endpoint": endpoint,
            "account_name": given.get("account"),
            "account_key": secrets.get("account_key_env"),
            "sas_key": secrets.get("sas_token_env"),
        }
    return {name: value for name, value in arguments.items() if value}


def _address(scheme: str, endpoint: str, given: dict[str, str]) -> tuple[str, int]:
    """Return the host and port that answer the requests."""
    parts = urlsplit(endpoint)
    if parts.hostname:
        return parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
    region = given.get("region") or os.environ.get("AWS_REGION") or "us-east-1"
    account = given.get("account") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    return _HOSTS[scheme].format(region=region, account=account), 443


def _open_folder(folder: Path) -> LocalStore:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError("this process may not read and write it")
        str(folder).encode()  # obstore takes no name that is not UTF-8
        return LocalStore(folder)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"url is {str(folder)!r}, which cannot be used: {error}") from None
