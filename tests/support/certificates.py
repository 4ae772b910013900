"""Certificates for servers on loopback, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificates(folder: Path) -> Path:
    """Make an authority, its certificate for 127.0.0.1, and another authority; return ``folder``.

    The files are ``ca.pem``, ``server.pem`` and ``server.key``, and ``other.pem``. Without openssl
    the test is skipped.
    """
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj")
    openssl("req", "-x509", *key, "/CN=trusted", "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", "-x509", *key, "/CN=other", "-keyout", "other.key", "-out", "other.pem")
    openssl("req", *key, "/CN=server", "-keyout", "server.key", "-out", "server.csr")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
        "-CAcreateserial", "-extfile", "names", "-out", "server.pem",
    )  # fmt: skip
    return folder
