"""A headless Chromium that reaches the loopback address only, controlled over pipes.

It reads messages of the DevTools protocol (JSON, with a zero byte after each) from descriptor 3 and
writes them to 4. The protocol shows when a page is complete, so no picture is taken too early.
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
TIMEOUT_S = 60.0  # of one call
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """Return the command of an installed Chromium, if any."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A page of the browser. `into` and `out` are descriptors of its pipes."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._calls, self._read = 0, b""
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def open(self, url: str, width: int, height: int) -> None:
        """Navigate to `url` in a window of this size."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self._call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until this expression is true."""
        until = time.monotonic() + TIMEOUT_S
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < until, self.run("document.body.innerText")
            time.sleep(0.05)  # the page sends no event for it

    def picture(self, clip: dict[str, float]) -> bytes:
        """Return a PNG of a part of the page (x, y, width, height), with all animations ended."""
        self.run(
            "document.head.appendChild(document.createElement('style')).textContent ="
            " '* { animation: none !important; transition: none !important }'"
        )
        taken = self._call("Page.captureScreenshot", format="png", clip=clip | {"scale": 1})
        return base64.b64decode(taken["data"])

    def _call(self, method: str, **params: Any) -> Any:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params} | self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + TIMEOUT_S
        while True:
            while b"\0" not in self._read:
                ready, _, _ = select.select([self._out], [], [], max(0.0, until - time.monotonic()))
                assert ready, f"{method}: no answer"
                more = os.read(self._out, 1 << 16)
                assert more, f"{method}: Chromium has ended"
                self._read += more
            message_read, _, self._read = self._read.partition(b"\0")
            response = json.loads(message_read)
            if response.get("id") == self._calls:  # all other messages are events
                assert "result" in response, response
                return response["result"]


@contextmanager
def browsing(command: str, folder: Path) -> Iterator[Page]:
    """Run `command`, with its data in `folder`, until `with` ends."""
    child_in, into = os.pipe()
    out, child_out = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", START, str(child_in), str(child_out), command),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--no-proxy-server", "--remote-debugging-pipe"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",),
            f"--user-data-dir={folder / 'browser'}",
        ],
        pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(child_in)
    os.close(child_out)
    try:
        yield Page(into, out)
    finally:
        os.close(into)  # ends the browser
        os.close(out)
        process.terminate()
        process.wait()
