"""Compiles the modules on the path of a lookup into a wheel, with mypyc.

pyproject.toml has the rest of the build. An editable install runs these modules uncompiled, and so
does a wheel that is built with KVCACHE_COMPILE=0 or without a C compiler.
"""

import os
import sys

from setuptools import Extension, setup

MODULES = (
    "keys",
    "segments",
    "eviction_pass",
    "guarded_policy",
    "index",
    "eviction/run_queue",
    "eviction/gittins/epochs",
    "eviction/gittins/lru_budget",
    "eviction/gittins/ranking",
    "eviction/gittins/known_runs",
    "eviction/gittins/side_runs",
    "eviction/gittins/policy",
)


def compiled() -> list[Extension]:
    """Return the modules, translated to C."""
    from mypyc.build import mypycify

    # mypy reads the imported modules for their types only, and reports no errors in them.
    files = [f"kvcache/{module}.py" for module in MODULES]
    options = ["--follow-imports=silent", *files]
    extensions = mypycify(options, group_name="kvcache", debug_level="0")
    for extension in extensions:
        extension.optional = True
    return extensions


wanted = "bdist_wheel" in sys.argv and os.environ.get("KVCACHE_COMPILE", "1") != "0"
setup(ext_modules=compiled() if wanted else [])
