"""A small HTTP server that speaks the part of vLLM 0.32 that rollouts use, with the small student behind it.

Requests are read as vLLM reads them (`GenerateRequest`, `MsgpackDecoder`), and answers have the keys and nesting of real ones; both were
written after vLLM's source and its answers, and `make test-vllm` runs the same engine against the real server.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vaopd.core import Head, token_log_probs
from vaopd.models.forward import rows
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.types import ORIGINAL, Prompt

Change = Callable[[dict[str, Any]], object]  # edits an answer's JSON in place


@dataclass
class FakeVLLM:
    """What the server is, what it was asked, and how it misbehaves."""

    model: Any
    vocab_size: int
    version: str = "0.32.0"
    settings: dict[str, Any] = field(default_factory=lambda: {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs"})
    normalises: bool = False  # mm_device_do_normalize
    max_model_len: int = 1024
    loads: bool = True  # False: acknowledges a reload and keeps its weights
    busy: bool = False  # its prefix cache can't be reset
    status: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> what is answered instead
    delay: float = 0.0
    change: Change | None = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    label: str = "default"
    lock: Any = field(default_factory=threading.Lock)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def requests(self) -> list[dict[str, Any]]:
        return [body for path, body in self.asked if path == "/inference/v1/generate"]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            time.sleep(self.delay)
            if path in self.status:
                return self.status[path]
            return 200, self._answer(path, body)

    def _answer(self, path: str, body: Any) -> Any:
        if path == "/version":
            return {"version": self.version}
        if path == "/server_info?config_format=json":
            config = {**self.settings, "multimodal_config": {"mm_device_do_normalize": self.normalises}}
            return {"vllm_config": {"model_config": config}}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if self.loads:
                state = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
                self.model.load_state_dict(state)
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": not self.busy}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return {"success": True, "new_version": self.label}
        if path == "/inference/v1/generate":
            answer = self._generate(body)
            if self.change:
                self.change(answer)
            return answer
        assert path in ("/health", "/reset_encoder_cache", "/reset_mm_cache"), path
        return ""

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM, with noise of one's own: siblings from the seed, logits biased, log-probabilities of the raw logits."""
        prompt, wanted = Prompt("request", torch.tensor(body["token_ids"]), decoded(body.get("features"))), body["sampling_params"]
        assert wanted["ignore_eos"]
        assert wanted["logprobs"] == 0
        assert all(bias == -1e9 for bias in wanted["logit_bias"].values())
        head_rows = self.model.get_output_embeddings().weight.shape[0]
        sampling = Sampling(
            min(wanted["max_tokens"], self.max_model_len - len(prompt.ids_P)), wanted["temperature"], wanted["top_p"], wanted["seed"]
        )
        forbidden = {int(index) for index in wanted["logit_bias"]}
        engine = HFEngine(self.model, sampling, vocab_size=head_rows, eos_ids=wanted["stop_token_ids"], forbidden_ids=forbidden)
        (group,) = engine.generate([prompt], wanted["n"], 0)
        weight = self.model.get_output_embeddings().weight
        with torch.no_grad():
            logp_N = token_log_probs(rows(self.model, [group], ORIGINAL), Head(weight), group.ids_N)
        choices = [
            {
                "index": index,
                "finish_reason": "stop" if ended else "length",
                "stop_reason": int(ids[-1]) if ended else None,
                "token_ids": ids.tolist(),
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
                "logprobs": {"content": [_entry(*pair) for pair in zip(ids.tolist(), logps.tolist(), strict=True)]},
            }
            for index, (ids, ended, logps) in enumerate(zip(group.responses, group.ended_K, logp_N.split(group.lengths), strict=True))
        ]
        placed = (body.get("features") or {}).get("mm_placeholders")
        return {
            "request_id": "generate-tokens-1",
            "model": "served",
            "usage": {"prompt_tokens": len(prompt.ids_P), "completion_tokens": len(group.ids_N)},
            "prompt_token_ids": body["token_ids"],
            "mm_placeholders": placed,
            "output_mode": "tokens",
            "choices": choices,
        }


def _entry(token: int, logp: float) -> dict[str, Any]:
    one = {"token_id": token, "logprob": min(logp, 0.0), "rank": 1}
    return {**one, "top_logprobs": [one]}


def decoded(features: dict[str, Any] | None) -> dict[str, dict[str, Tensor]]:
    """The images' tensors of a request, as vLLM's decoder and its field types put them together."""
    if features is None:
        return {}
    items = [_read(base64.b64decode(item), 0)[0] for item in features["kwargs_data"]["image"]]
    assert len(items) == len(features["mm_hashes"]["image"]) == len(features["mm_placeholders"]["image"])
    for item in items:
        (flat, whole), (batched, kept) = item["pixel_values"]["field"], item["image_grid_thw"]["field"]
        assert (flat, whole["dim"], whole["keep_on_cpu"]) == ("flat", 0, False)
        assert (batched, kept) == ("batched", {"keep_on_cpu": True})
    pixels = torch.cat([_tensor(item["pixel_values"]["data"]) for item in items])
    grids = torch.stack([_tensor(item["image_grid_thw"]["data"]) for item in items])
    return {ORIGINAL: {"pixel_values": pixels, "image_grid_thw": grids}}


def _tensor(parts: list[Any]) -> Tensor:
    dtype, shape, raw = parts
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).view(shape)


def _read(data: bytes, at: int) -> tuple[Any, int]:
    """The msgpack value at a place and the place after it (https://github.com/msgpack/msgpack/blob/master/spec.md)."""
    kind, at = data[at], at + 1
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    if kind == 0xD3:
        return struct.unpack_from(">q", data, at)[0], at + 8
    (size,), at = struct.unpack_from(">I", data, at), at + 4
    if kind == 0xDB:
        return data[at : at + size].decode(), at + size
    if kind == 0xC9:
        assert data[at] == 3, "vLLM's extension for raw tensors"
        return data[at + 1 : at + 1 + size], at + 1 + size
    values = []
    for _ in range(size * {0xDF: 2, 0xDD: 1}[kind]):
        value, at = _read(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if kind == 0xDF else values), at


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[str]:
    """The server on a free port of the loopback; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            status, answer = fake.answer(self.path, json.loads(raw) if raw else None)
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/version")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that gave up is no error here
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
