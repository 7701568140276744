"""The judge of a benchmark: any OpenAI-compatible endpoint, behind a relay on this machine that lmms-eval talks to.

lmms-eval's tasks find their judge in different environment variables, some name a fixed model, and all of them count an answer as wrong
when the judge can't be reached. The relay puts in the model and the key, which stay in this process, and counts what failed.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vaopd.errors import ConfigError

KEY_VARIABLE = "VAOPD_JUDGE_KEY"
SLOW = 120  # seconds without an answer
ATTEMPTS = 4
PAUSES = (1.0, 4.0, 15.0)  # seconds between them
LARGEST = 32_000_000  # bytes of a question or an answer
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Judge:
    """Where questions of right or wrong go."""

    url: str  # as OpenAI's clients take it: ends before /chat/completions
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def from_options(cls, url: str | None, model: str | None, key_variable: str = KEY_VARIABLE) -> Judge | None:
        """None without a URL. Raises `ConfigError` for half a judge, a URL that is none, or a key that no header can hold."""
        if url is None and model is None:
            return None
        if url is None or not model:
            raise ConfigError("a judge needs both --judge-url and --judge-model, as in http://127.0.0.1:8000/v1 and Qwen/Qwen3-32B")
        try:
            parts = urllib.parse.urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii() and url.isprintable()
        except ValueError:  # a port that is no number, half a bracket
            fits = False
        if not fits or " " in url:  # not shown whole: it may have a secret in it
            raise ConfigError(f"--judge-url '{url.partition(':')[0]}:…' is no http(s) address. Give one like http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError(f"--judge-url has a secret in it. Put the key into the environment variable {key_variable} instead")
        key = os.environ.get(key_variable, "").strip()  # a file's line end, most often
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the key in the environment variable {key_variable} has signs that a request can't hold. Copy it again")
        return cls(url.rstrip("/").removesuffix("/chat/completions"), model, key or None)


class JudgeError(Exception):
    """The judge gave no verdict."""


@dataclass
class Relay:
    """A relay that is running, and what went through it."""

    url: str  # base and full address at once: lmms-eval's tasks post to it, or to /chat/completions below it
    token: str
    asked: int = 0
    failures: list[str] = field(default_factory=list)


def ask(judge: Judge, question: dict[str, Any]) -> dict[str, Any]:
    """One chat completion from the judge, with its own model in the place of the question's.

    Raises:
        JudgeError: after `ATTEMPTS` attempts, at once where another would fail alike, or when the answer has no text.
    """
    data = json.dumps({**question, "model": judge.model}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {judge.key}"} if judge.key else {})
    request = urllib.request.Request(f"{judge.url}/chat/completions", data, headers, method="POST")
    for attempt in range(ATTEMPTS):
        try:
            with _opener.open(request, timeout=SLOW) as response:
                return _checked(response.read(LARGEST))
        except urllib.error.HTTPError as error:
            problem, again = f"HTTP {error.code} {error.reason}", error.code in TRY_AGAIN
        except (OSError, http.client.HTTPException) as error:  # HTTPException: an answer that breaks off
            problem, again = str(getattr(error, "reason", error)) or type(error).__name__, True
        if not again or attempt + 1 == ATTEMPTS:
            raise JudgeError(problem)
        time.sleep(PAUSES[attempt])
    raise AssertionError


def _checked(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise JudgeError("the answer is no chat completion") from None
    if not isinstance(text, str) or not text.strip():  # a reasoning model that spent its tokens on thinking
        raise JudgeError("the answer has no text; a model that thinks first needs more tokens than the benchmark gives its judge")
    return dict(answer)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


@contextmanager
def relay(judge: Judge) -> Iterator[Relay]:
    """Serve `judge` on a free port of 127.0.0.1 to whoever has the relay's token."""
    state = Relay("", secrets.token_urlsafe(24))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or -1)
            if not secrets.compare_digest(self.headers.get("Authorization") or "", f"Bearer {state.token}"):
                return self._reply(401, {"error": {"message": "no token"}}, close=True)
            if not self.path.endswith("/chat/completions") or not 0 <= length <= LARGEST:
                return self._reply(404, {"error": {"message": "only chat completions are relayed"}}, close=True)
            with lock:
                state.asked += 1
            try:
                question = json.loads(self.rfile.read(length))
                return self._reply(200, ask(judge, question))
            except (JudgeError, ValueError, TypeError) as error:
                with lock:
                    state.failures.append(str(error))
                # 400: lmms-eval's clients don't ask again, as this has been done here.
                return self._reply(400, {"error": {"message": f"the judge gave no verdict: {error}"}})

        def _reply(self, status: int, content: dict[str, Any], *, close: bool = False) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if close:  # what was sent along is left unread
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Questions are nobody's business."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
