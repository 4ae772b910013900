"""What `docs/deploy` starts: valid, without privileges, and as its pages say. Nothing is started.

`tests/e2e/test_deploy.py` starts the containers' commands.
"""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

import kvcache
from kvcache import cli
from kvcache.profiles import load_profile
from kvcache.sizes import parse_size
from tests.install_engine import ENGINE_VERSION
from tests.support import deployment_files
from tests.support.deployment_files import (
    COMPOSE,
    FOLDER,
    MANIFESTS,
    OBJECT_STORE_PATCH,
    PAGE,
    ROOT,
    Value,
)
from tests.support.engine.trace_viewer import OFFLINE, PACKAGE
from tests.test_package import NOT_PUBLISHED

TRACING = FOLDER / "compose-tracing.yaml"
COMPOSES = [COMPOSE, TRACING]
TRACING_PAGE = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8")
VIEWERS: Value = yaml.safe_load(TRACING.read_text(encoding="utf-8"))["services"]
KUBERNETES = ("1.32", "1.37")  # the oldest that is looked at, and the newest that has schemas here
SECRET = "of the test"
NAME = "deepseek-r1-distill-llama-8b"
SHAPE = {"--layers": 32, "--kv-heads": 8, "--head-dim": 128}  # as the model's config.json has it


def named(path: Path) -> str:
    return path.name


# Valid


def validate(found: Value) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_manifest_is_what_kubernetes_takes(manifest: Path) -> None:
    for found in deployment_files.objects(manifest):
        validate(found)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pod: pod["containers"][0].update(readinesProbe={}),
        lambda pod: pod.update(hostIpc=True),
        lambda pod: pod["containers"][0]["env"][0].update(value=1),
        lambda pod: pod["containers"][0]["securityContext"].update(privileged="no"),
    ],
)
def test_a_misspelt_key_or_a_wrong_value_is_found(wrong: Any) -> None:
    deployment = copy.deepcopy(deployment_files.objects(MANIFESTS[0])[0])
    wrong(deployment["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)


def compose_errors(file: Path) -> str:
    """What the schema of the compose specification has against a file."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, file], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("file", COMPOSES, ids=named)
def test_a_compose_file_is_what_compose_takes(file: Path) -> None:
    assert not compose_errors(file)


def test_a_misspelt_key_of_compose_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text(encoding="utf-8").replace("mem_limit:", "memlimit:"))
    assert "memlimit" in compose_errors(wrong)


# No privileges


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_pod_has_no_privileges_and_nothing_of_the_host(manifest: Path) -> None:
    for _, pod in deployment_files.pods(manifest):
        assert not {key for key in pod if key.startswith("host")}
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for volume in pod.get("volumes", ()):
            assert set(volume) == {"name", "emptyDir"}
            assert "medium" not in volume["emptyDir"]  # memory that L1 does not know of
        assert not [m for m in container.get("volumeMounts", ()) if "shm" in m["mountPath"]]


def test_a_service_has_no_privileges_and_nothing_of_the_host() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert int(service["user"].partition(":")[0]) > 0
        assert not {"privileged", "cap_add", "ipc", "pid", "shm_size", "network_mode"} & set(
            service
        )
        assert service["memswap_limit"] == service["mem_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


# Numbers


def plan_of(file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    """The options of the `kvcache plan` in a file's comment, and what it prints."""
    [command] = re.findall(r"(?m)^ *# +kvcache plan (.*)$", file.read_text(encoding="utf-8"))
    words = shlex.split(command)
    assert cli.main(["plan", *words, "--bandwidth", "20GiB"]) == 0
    return dict(zip(words[::2], words[1::2], strict=True)), capsys.readouterr().out


@pytest.mark.parametrize("file", [*MANIFESTS, COMPOSE], ids=named)
def test_the_numbers_are_those_of_the_plan(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, said = plan_of(file, capsys)
    engine = deployment_files.containers(file, SECRET)[0]
    capacity = engine.environment["KVCACHE__L1__CAPACITY"]
    assert f"KVCACHE__L1__CAPACITY={capacity}\n" in said
    assert parse_size(asked["--pod-memory"]) == engine.memory
    assert asked["--block-tokens"] == engine.option("--block-size")
    weights, own = 15 << 30, int(engine.environment["VLLM_CPU_KVCACHE_SPACE"]) << 30
    assert parse_size(asked["--engine-memory"]) >= weights + own + (6 << 30)
    assert {name: int(asked[name]) for name in SHAPE} == SHAPE


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_pod_is_given_what_it_may_take(manifest: Path) -> None:
    """L1 is taken at start: memory that is only promised would be an eviction later."""
    for _, pod in deployment_files.pods(manifest):
        resources = pod["containers"][0]["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
    [(_, pod), *_] = deployment_files.pods(manifest)
    cores = pod["containers"][0]["resources"]["limits"]["cpu"]
    assert deployment_files.containers(manifest, SECRET)[0].environment["OMP_NUM_THREADS"] == cores


@pytest.mark.parametrize("file", [MANIFESTS[1], COMPOSE], ids=named)
def test_the_server_is_as_the_page_about_redis_advises(file: Path) -> None:
    server = deployment_files.containers(file, SECRET)[1]
    said = dict(re.findall(r"(?m)^(\w\S*) (.*)$", server.command[-1]))
    assert said["maxmemory-policy"] == "allkeys-lru"
    assert (said["save"], said["appendonly"]) == ('""', "no")
    maxmemory = parse_size(said["maxmemory"].removesuffix("gb") + "GiB")
    assert maxmemory <= server.memory * 3 // 4
    assert said["requirepass"] == "$KV_REDIS_PASSWORD"
    assert SECRET not in " ".join(server.command)


# As the others say


@pytest.mark.parametrize("file", [*MANIFESTS, COMPOSE], ids=named)
def test_the_settings_are_ones_that_profiles_take(file: Path) -> None:
    environ = deployment_files.containers(file, SECRET)[0].environment
    profile = load_profile(environ=environ)
    assert profile.name == ("l1-only" if file == MANIFESTS[0] else "l1-redis")
    if profile.name == "l1-redis":
        redis = profile.tiers[1].options
        assert str(redis["url"]).endswith("redis:6379")
        assert environ[str(redis["password_env"])] == SECRET


def changed(files: list[Path]) -> tuple[Value, Value]:
    """The engines' environments of two files, and all else must be equal."""
    one, two = (deployment_files.objects(file)[:2] for file in files)
    environments = [
        {
            entry.pop("name"): entry
            for entry in found[0]["spec"]["template"]["spec"]["containers"][0].pop("env")
        }
        for found in (one, two)
    ]
    assert one == two
    return environments[0], environments[1]


def test_with_a_server_only_that_is_different() -> None:
    alone, shared = changed(MANIFESTS)
    assert {name for name in shared if shared[name] != alone.get(name)} == {
        "KVCACHE_PROFILE", "KVCACHE__REDIS__URL", "KVCACHE__REDIS__PASSWORD_ENV",
        "KV_REDIS_PASSWORD",
    }  # fmt: skip
    assert set(alone) <= set(shared)


def test_the_engine_of_compose_is_that_of_the_pod() -> None:
    pod, service = (
        deployment_files.containers(file, SECRET)[0] for file in (MANIFESTS[1], COMPOSE)
    )
    own = {"--shutdown-timeout", "30", "--otlp-traces-endpoint", "http://collector:4317"}
    assert set(pod.command) ^ set(service.command) == own
    sizes = {"KVCACHE__L1__CAPACITY", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"}
    sizes |= {"KVCACHE__REDIS__URL", "OTEL_SERVICE_NAME"}
    assert {
        name
        for name in pod.environment | service.environment
        if pod.environment.get(name) != service.environment.get(name)
    } == sizes


@pytest.mark.parametrize("file", [*MANIFESTS, COMPOSE], ids=named)
def test_the_connector_is_as_its_own_page_says(file: Path) -> None:
    [settings, *_] = re.findall(
        r"--kv-transfer-config '(\{.*?\})'",
        (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    engine = deployment_files.containers(file, SECRET)[0]
    assert json.loads(engine.option("--kv-transfer-config")) == json.loads(settings)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_the_gateway_finds_the_engine(manifest: Path) -> None:
    """By the names, labels and ports that AIBrix's gateway goes by."""
    deployment, service = deployment_files.objects(manifest)[:2]
    pod = deployment["spec"]["template"]
    [port] = pod["spec"]["containers"][0]["ports"]
    labels = {"model.aibrix.ai/name": NAME}
    assert deployment["metadata"]["labels"] == labels | {"model.aibrix.ai/port": "8000"}
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == NAME
    assert service["metadata"]["labels"]["model.aibrix.ai/name"] == NAME
    engine = deployment_files.containers(manifest, SECRET)[0]
    assert (
        engine.option("--served-model-name")
        == json.loads(deployment_files.request().body)["model"]
        == NAME
    )
    assert str(port["containerPort"]) == engine.option("--port") == "8000"
    assert {at["port"]: at["targetPort"] for at in service["spec"]["ports"]} == {
        8000: 8000, 8080: 8000,
    }  # fmt: skip
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = pod["spec"]["containers"][0][probe]["httpGet"]
        assert asked == {"path": "/health", "port": port["containerPort"]}
    starts = pod["spec"]["containers"][0]["startupProbe"]
    waits = starts["periodSeconds"] * starts["failureThreshold"]
    assert deployment["spec"]["progressDeadlineSeconds"] > waits


def test_the_server_is_reached_by_engines_alone() -> None:
    *_, server, service, policy = deployment_files.objects(MANIFESTS[1])
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    [rule] = policy["spec"]["ingress"]
    [allowed] = rule["from"]
    assert allowed["podSelector"]["matchLabels"] == {"model.aibrix.ai/name": NAME}
    engine = deployment_files.containers(MANIFESTS[1], SECRET)[0]
    url = f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert engine.environment["KVCACHE__REDIS__URL"] == url


def test_the_image_is_of_the_engine_that_is_tested() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert f"FROM vllm/vllm-openai-cpu:v{ENGINE_VERSION}\n" in dockerfile
    [extras] = re.findall(r"pip install .*'/src\[(.*)\]'", dockerfile)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"].keys()
    assert set(extras.split(",")) == {"vllm", "redis", "object"} < known
    for file in [*MANIFESTS, COMPOSE]:
        image = deployment_files.containers(file, SECRET)[0].image
        assert image.endswith(f"vllm-kvcache:{kvcache.__version__}")
    assert f"-t {deployment_files.containers(MANIFESTS[0], SECRET)[0].image} ." in dockerfile
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()[1:]
    assert [line.removeprefix("**/") for line in ignored] == list(NOT_PUBLISHED)


def test_the_page_names_what_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named_files = set(re.findall(r"docs/deploy/([\w.-]+)", page))
    assert {file.name for file in [*MANIFESTS, OBJECT_STORE_PATCH, COMPOSE]} < named_files
    assert all((FOLDER / name).exists() for name in named_files)
    secrets = re.findall(r"kubectl create secret generic .*", page)
    assert secrets
    files = [path.read_text(encoding="utf-8") for path in (MANIFESTS[1], OBJECT_STORE_PATCH)]
    for secret in secrets:
        assert any(f"#   {secret}\n" in text for text in files)


def test_the_plan_on_the_page_is_that_of_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    asked, said = plan_of(MANIFESTS[0], capsys)
    [command] = re.findall(r"(?m)^kvcache plan ((?:.*\\\n)*.*)$", page)
    words = shlex.split(command.replace("\\\n", " "))
    assert dict(zip(words[::2], words[1::2], strict=True)) == asked | {"--bandwidth": "20GiB"}
    assert f"```text\n{said}```" in page


# Viewers of traces


@pytest.mark.parametrize("name", VIEWERS)
def test_a_service_is_pinned_and_on_loopback_alone(name: str) -> None:
    service = VIEWERS[name]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+", service["image"])
    published = [str(port).split(":") for port in service["ports"]]
    assert all(address == "127.0.0.1" and inner == outer for address, outer, inner in published)
    ports = {outer for _, outer, _ in published}
    assert {"4317", "4318"} < ports
    [shown] = ports - {"4317", "4318"}
    [row] = re.findall(rf"(?m)^\| `{name}` \|.*$", TRACING_PAGE)
    assert f"`http://127.0.0.1:{shown}`" in row


def test_either_collects_what_the_engine_of_compose_sends() -> None:
    including = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    assert including["include"] == [TRACING.name]
    endpoint = deployment_files.containers(COMPOSE, SECRET)[0].option("--otlp-traces-endpoint")
    for service in VIEWERS.values():
        assert endpoint == f"http://{service['networks']['default']['aliases'][0]}:4317"


def started(page: str) -> Iterator[tuple[Path, str]]:
    """The compose files and profiles that a page's commands start."""
    for file, profile in re.findall(r"(?m)docker compose -f (\S+) --profile (\S+) up", page):
        yield ROOT / file, profile


def test_every_command_of_the_pages_starts_a_service() -> None:
    profiles = [profile for service in VIEWERS.values() for profile in service["profiles"]]
    assert len(set(profiles)) == len(VIEWERS)  # they take the same ports: one at a time
    assert sorted(started(TRACING_PAGE)) == sorted((TRACING, profile) for profile in profiles)
    [(file, profile)] = started(PAGE.read_text(encoding="utf-8"))
    assert file == COMPOSE
    assert profile in profiles


def test_the_viewer_of_the_page_is_the_one_that_is_tested() -> None:
    assert f"pip install {PACKAGE}\n" in TRACING_PAGE
    for name, value in OFFLINE.items():
        assert f"{name}={value}" in TRACING_PAGE


def test_the_picture_is_there_and_small() -> None:
    [picture] = re.findall(r"!\[.*?\]\((.*?)\)", TRACING_PAGE)
    content = (ROOT / "docs" / picture).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 300_000
