"""What every test stands on: no setting of the user's shell, and no deadline on generated cases."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvcache import telemetry

# How long a case takes says more about the machine than the code. The cases are the same every
# time, so that what fails is the change's doing; HYPOTHESIS_SEARCH=1 looks for new ones.
settings.register_profile(
    "kvcache", deadline=None, derandomize="HYPOTHESIS_SEARCH" not in os.environ
)
settings.load_profile("kvcache")


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_shell() -> Iterator[None]:
    """Take away the variables, ours and AIBrix's, that whoever runs the tests has set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("KVCACHE", "AIBRIX_KV_CACHE_OL_", "VLLM_AIBRIX_")):
                patch.delenv(name)
        yield


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """An application's own SDK: the spans that have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("kvcache"))
    return exporter
