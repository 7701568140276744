"""A headless Chromium through its debugging pipe: loads a file, evaluates JavaScript, reports console errors. No network, no packages."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    """One tab. The pipe speaks NUL-separated JSON on the child's descriptors 3 (in) and 4 (out)."""

    def __init__(self) -> None:
        assert CHROMIUM
        self.profile = tempfile.mkdtemp(prefix="vaopd-report-")
        to_child, self.write_end = os.pipe()
        self.read_end, from_child = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_child, from_child)]  # out of the way of 3 and 4

        def join() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=join, pass_fds=(3, 4), **quiet)
        for end in (to_child, from_child, *ends):
            os.close(end)
        self.buffer, self.count, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            piece = os.read(self.read_end, 1 << 16)
            if not piece:
                raise RuntimeError("Chromium ended")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        """Loads the file at this size and waits until it has been laid out."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(100):
            if any(e.get("method") == "Page.loadEventFired" for e in self.events):
                return
            self.call("Page.getLayoutMetrics")
            time.sleep(0.05)
        raise RuntimeError(f"{path} did not load")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page (the debugger's own evaluation is not subject to the page's policy)."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """Uncaught exceptions, console errors and log entries (policy violations, failed loads) since `open`."""
        self.call("Page.getLayoutMetrics")
        kinds = {"Runtime.exceptionThrown", "Log.entryAdded"}
        found = [
            e
            for e in self.events
            if e.get("method") in kinds or (e.get("method") == "Runtime.consoleAPICalled" and e["params"]["type"] == "error")
        ]
        return [json.dumps(e["params"])[:400] for e in found]

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """A PNG of the whole page, or of what is in view."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)
        os.close(self.write_end)
        os.close(self.read_end)
        shutil.rmtree(self.profile, ignore_errors=True)
