"""What `docs/deploy` starts and `docs/tracing.md` says of it agree. Nothing is started here."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.viewer import PACKAGE, QUIET

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docs" / "deploy" / "compose-tracing.yaml"
PAGE = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_and_on_loopback_alone(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+", service["image"])
    published = [str(port).split(":") for port in service["ports"]]
    assert all(address == "127.0.0.1" and inner == outer for address, outer, inner in published)
    ports = {outer for _, outer, _ in published}
    assert {"4317", "4318"} < ports
    [shown] = ports - {"4317", "4318"}
    [row] = re.findall(rf"(?m)^\| `{name}` \|.*$", PAGE)
    assert f"`http://127.0.0.1:{shown}`" in row


def test_every_command_of_the_page_starts_a_service() -> None:
    started = re.findall(r"(?m)^docker compose -f (\S+) --profile (\S+) up -d$", PAGE)
    assert all(ROOT / file == COMPOSE for file, _ in started)
    profiles = [profile for service in SERVICES.values() for profile in service["profiles"]]
    assert sorted(profile for _, profile in started) == sorted(profiles)
    assert len(set(profiles)) == len(SERVICES)  # they take the same ports: one at a time


def test_the_viewer_of_the_page_is_the_one_that_is_tested() -> None:
    assert f"pip install {PACKAGE}\n" in PAGE
    for name, value in QUIET.items():
        assert f"{name}={value}" in PAGE


def test_the_picture_is_there_and_small() -> None:
    [picture] = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    content = (ROOT / "docs" / picture).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 300_000
