"""What `docs/deploy` starts, read from its files: the containers, whoever starts them.

A Kubernetes container and a compose service say the same with other words; here both are a
`Container`. Invariant: command and environment are what the process would get, with secrets from
`secret` in their places, and nothing that the file does not say.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvcache.sizes import parse_size

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "deploy"
PAGE = ROOT / "docs" / "deployment.md"
MANIFESTS = [FOLDER / "vllm-l1.yaml", FOLDER / "vllm-l1-redis.yaml"]
OBJECT_STORE_PATCH = FOLDER / "object-store-patch.yaml"
COMPOSE = FOLDER / "compose.yaml"

Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Container:
    """A container: its process, what it may use, and how it is asked whether it is ready.

    `ready` is either the path of a GET or the words of a command.
    """

    image: str
    command: list[str]
    environment: dict[str, str]
    memory: int  # bytes, its limit
    ready: str | list[str]

    def option(self, name: str) -> str:
        """The word after `name` in the command."""
        return self.command[self.command.index(name) + 1]


def objects(manifest: Path) -> list[Value]:
    """The Kubernetes objects of a file."""
    return [found for found in yaml.safe_load_all(manifest.read_text(encoding="utf-8")) if found]


def patched_deployment(manifest: Path, patch: Path) -> Value:
    """Return the first object of a manifest after `kubectl patch` with a file.

    This is the default, a strategic merge: containers and variables are matched by name.
    """
    change = yaml.safe_load(patch.read_text(encoding="utf-8"))
    merged: Value = _merged(objects(manifest)[0], change)
    return merged


def _merged(value: Any, change: Any) -> Any:
    if isinstance(value, dict) and isinstance(change, dict):
        return value | {name: _merged(value.get(name), each) for name, each in change.items()}
    if isinstance(value, list) and all("name" in each for each in [*value, *change]):
        by_name = {each["name"]: each for each in value}
        return [*_merged(by_name, {each["name"]: each for each in change}).values()]
    return change


def pods(manifest: Path) -> Iterator[tuple[Value, Value]]:
    """Each Deployment of a file, and the pod that it makes."""
    for found in objects(manifest):
        if found["kind"] == "Deployment":
            yield found, found["spec"]["template"]["spec"]


def containers(file: Path, secret: str) -> list[Container]:
    """The containers that a file starts, vLLM's first; every secret in it is `secret`."""
    if file == COMPOSE:
        services = yaml.safe_load(file.read_text(encoding="utf-8"))["services"].values()
        return [_service(service, secret) for service in services]
    return [_container(pod["containers"][0], secret) for _, pod in pods(file)]


def container_of(deployment: Mapping[str, Any], secret: str) -> Container:
    """The first container of a Deployment; every secret in it is `secret`."""
    return _container(deployment["spec"]["template"]["spec"]["containers"][0], secret)


def _container(found: Mapping[str, Any], secret: str) -> Container:
    probe = found["readinessProbe"]
    return Container(
        found["image"],
        [*found["command"], *found["args"]],
        {entry["name"]: entry.get("value", secret) for entry in found["env"]},
        _quantity(found["resources"]["limits"]["memory"]),
        probe.get("httpGet", {}).get("path", ""),
    )


def _service(found: Mapping[str, Any], secret: str) -> Container:
    def filled(text: str) -> str:
        """What compose makes of `$$` and of a variable, `$NAME` or `${NAME:?...}`."""
        return re.sub(
            r"\$(\$|\w+|\{[^}]*\})", lambda at: "$" if at[1] == "$" else secret, str(text)
        )

    return Container(
        found["image"],
        [filled(word) for word in [*found["entrypoint"], *found["command"]]],
        {name: filled(value) for name, value in found["environment"].items()},
        parse_size(found["mem_limit"].removesuffix("g") + "GiB"),
        found.get("healthcheck", {}).get("test", ["CMD"])[1:],
    )


def _quantity(text: str) -> int:
    """The bytes of what Kubernetes calls a quantity: "120Gi" is binary, "120G" is not."""
    return parse_size(text + "B")


@dataclass(frozen=True, slots=True)
class Request:
    """What a `curl` command sends."""

    url: str
    headers: dict[str, str]
    body: str


def request() -> Request:
    """The one that the page asks the engine."""
    [command] = re.findall(r"(?m)^curl (?:.*\\\n)*.*'\{[^']*\}'$", PAGE.read_text(encoding="utf-8"))
    words = shlex.split(command.replace("\\\n", " "))[1:]
    headers, body, url = {}, "", ""
    while words:
        match words:
            case ["-H", header, *words]:
                name, _, value = header.partition(": ")
                headers[name] = value
            case ["-d", body, *words]:
                pass
            case [url, *words]:
                assert url.startswith("http"), f"curl {url}: not known here"
    return Request(url, headers, body)
