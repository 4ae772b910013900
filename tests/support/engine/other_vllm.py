"""Runs scenarios on an engine of another vLLM, in the environment that `make` made for that one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvcache.connectors.vllm.vllm_names import OLDEST_VLLM
from tests.support import marks
from tests.support.engine.engine import EngineSettings
from tests.support.engine.process import (
    EngineRun,
    Scenario,
    environment,
    names_of,
    read_report,
    run_here,
)

ROOT = Path(__file__).resolve().parents[3]


def other_python() -> Path | None:
    """Return the interpreter of the oldest vLLM, or where that one runs, of the usual one."""
    oldest = ROOT.glob(f".venv-vllm-{'.'.join(map(str, OLDEST_VLLM))}.*")
    pythons = [folder / "bin" / "python" for folder in (*oldest, ROOT / ".venv")]
    return next(
        (
            python
            for python in pythons
            if python.exists() and python.parents[1] != Path(sys.prefix).resolve()
        ),
        None,
    )


def run_with(
    python: Path, settings: EngineSettings, scenarios: Sequence[Scenario], folder: Path
) -> EngineRun:
    """Do as `process.run_scenarios` does, with the interpreter of another environment."""
    marks.require("engine")
    variables = environment(settings) | {"PYTHONPATH": str(ROOT)}
    work = json.dumps([asdict(settings), names_of(scenarios), str(folder), variables])
    command = [str(python), "-m", "tests.support.engine.other_vllm", work]
    done = subprocess.run(command, cwd=ROOT, env=variables, check=False)
    return read_report(folder, done.returncode)


def main() -> None:
    """Run in the other environment."""
    settings, scenarios, folder, variables = json.loads(sys.argv[1])
    run_here(EngineSettings(**settings), scenarios, Path(folder), variables)
    sys.stdout.flush()
    os._exit(0)  # as the end of a forked process, without what vLLM registered


if __name__ == "__main__":
    main()
