"""Headless Chromium, driven through a pair of pipes in the DevTools protocol: nothing else needs to be installed.

Reference: https://chromedevtools.github.io/devtools-protocol/; ``--remote-debugging-pipe`` makes the browser read JSON
messages, each ended by a zero byte, from its file descriptor 3 and answer on 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",  # Chromium refuses to run as root with it; it only ever sees our own page
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # containers have little shared memory
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    """Return the path of Chromium or of a browser made from it; None if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a headless Chromium; ``with Browser(1600, 1200) as page: page.open(url)``.

    Args:
        width, height: size of the page in pixels; what lies below is not drawn.
        scale: of screenshots, pixels for each pixel of the page.
        patience: seconds that an answer may take.

    Raises:
        FileNotFoundError: there is no Chromium.
    """

    def __init__(self, width: int = 1600, height: int = 1200, *, scale: float = 1, patience: float = 60):
        if (program := find_chromium()) is None:
            raise FileNotFoundError("there is no Chromium here; on Debian: apt-get install chromium")
        self.patience, self.sent, self.session, self.unread = patience, 0, "", b""
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        theirs_in, self.write = _high(os.pipe())
        self.read, theirs_out = _high(os.pipe())
        command = [program, *FLAGS, f"--user-data-dir={self.profile}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            size = dict(width=width, height=height, deviceScaleFactor=scale, mobile=False)
            self.call("Emulation.setDeviceMetricsOverride", **size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        try:
            self.session = ""
            self.call("Browser.close")  # it waits for its children, where terminate() would orphan them
            self.process.wait(10)
        except (OSError, RuntimeError, TimeoutError):
            pass
        try:
            self.process.terminate()
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        os.close(self.write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result; events in between are dropped."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.patience
        while (answer := self._receive(deadline)).get("id") != self.sent:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.unread:
            if not select.select([self.read], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer within {self.patience} s")
            if not (data := os.read(self.read, 1 << 20)):
                raise RuntimeError(f"Chromium ended with exit code {self.process.wait()}")
            self.unread += data
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page; what its scripts draw later is for ``wait_for``."""
        error = self.call("Page.navigate", url=url).get("errorText")
        if error:
            raise RuntimeError(f"{url}: {error}")
        self.wait_for("location.href != 'about:blank' && document.readyState == 'complete'")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression on the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "JavaScript failed"))
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = 60) -> Any:
        """Return the first value of a JavaScript expression that JavaScript takes for true."""
        deadline = time.monotonic() + timeout
        while not (value := self.evaluate(f"(() => {{ const v = {script}; return v ? v : null }})()")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not on the page after {timeout} s: {script}")
            time.sleep(0.2)
        return value

    def screenshot(self, path: Path) -> None:
        """Save what the page shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def _high(pipe: tuple[int, int]) -> tuple[int, int]:
    """Move file descriptors out of the way of 3 and 4, which the browser's ends become."""
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe)
    for end in pipe:
        os.close(end)
    return moved[0], moved[1]
