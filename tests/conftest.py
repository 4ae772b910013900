"""What every test stands on: no setting of the user's shell, and no deadline on generated cases."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long a case takes says more about the machine than about the code.
settings.register_profile("kvcache", deadline=None)
settings.load_profile("kvcache")


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_shell() -> Iterator[None]:
    """Take away the KVCACHE variables that whoever runs the tests has set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("KVCACHE"):
                patch.delenv(name)
        yield
