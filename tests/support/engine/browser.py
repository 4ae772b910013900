"""A headless Chromium that reaches loopback and nothing else, and is talked to over a pipe.

It speaks the DevTools protocol: JSON, a zero byte after each message, in on its descriptor 3 and
out on 4. So a page is pictured when it says that it is complete, and not after a while.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LONG = 60.0  # seconds that one answer may take
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """The command of a Chromium, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A page of the browser."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._asked, self._read = 0, b""
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def open(self, url: str, width: int, height: int) -> None:
        """Go to `url` in a window of this size."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self._call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """What an expression of JavaScript is."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until this expression is true."""
        until = time.monotonic() + LONG
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < until, self.run("document.body.innerText")
            time.sleep(0.05)  # a page tells nobody what it shows

    def picture(self, clip: dict[str, float]) -> bytes:
        """A PNG of a part of it (x, y, width, height), with all that moves at its end."""
        self.run(
            "document.head.appendChild(document.createElement('style')).textContent ="
            " '* { animation: none !important; transition: none !important }'"
        )
        taken = self._call("Page.captureScreenshot", format="png", clip=clip | {"scale": 1})
        return base64.b64decode(taken["data"])

    def _call(self, method: str, **params: Any) -> Any:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params} | self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + LONG
        while True:
            while b"\0" not in self._read:
                ready, _, _ = select.select([self._out], [], [], max(0.0, until - time.monotonic()))
                assert ready, f"{method}: no answer"
                more = os.read(self._out, 1 << 16)
                assert more, f"{method}: Chromium has ended"
                self._read += more
            answer, _, self._read = self._read.partition(b"\0")
            answered = json.loads(answer)
            if answered.get("id") == self._asked:  # all else are events
                assert "result" in answered, answered
                return answered["result"]


@contextmanager
def browsing(command: str, folder: Path) -> Iterator[Page]:
    """Start it with a profile in `folder`, and end it."""
    for_it, into = os.pipe()
    out, from_it = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", START, str(for_it), str(from_it), command),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--no-proxy-server", "--remote-debugging-pipe"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",),
            f"--user-data-dir={folder / 'browser'}",
        ],
        pass_fds=(for_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(for_it)
    os.close(from_it)
    try:
        yield Page(into, out)
    finally:
        os.close(into)  # which ends it
        os.close(out)
        process.terminate()
        process.wait()
