"""Compiles what every look-up goes through, with mypyc, into a wheel.

The rest of how kvcache is built stands in pyproject.toml. A checkout that is installed as editable
runs these modules as they are written, and so does a wheel that is built with KVCACHE_COMPILE=0, or
where no C compiler is.
"""

import os
import sys

from setuptools import Extension, setup

MODULES = (
    "keys",
    "segments",
    "index",
    "eviction/gittins/epochs",
    "eviction/gittins/lru_budget",
    "eviction/gittins/ranking",
    "eviction/gittins/known_runs",
    "eviction/gittins/policy",
)


def compiled() -> list[Extension]:
    """The modules, translated to C."""
    from mypyc.build import mypycify

    # What these import is looked at for its types, and is no concern of this.
    files = [f"kvcache/{module}.py" for module in MODULES]
    options = ["--follow-imports=silent", *files]
    extensions = mypycify(options, group_name="kvcache", debug_level="0")
    for extension in extensions:
        extension.optional = True
    return extensions


wanted = "bdist_wheel" in sys.argv and os.environ.get("KVCACHE_COMPILE", "1") != "0"
setup(ext_modules=compiled() if wanted else [])
