"""A vLLM server as training needs it: reached on this machine only, checked before use, given the student's weights from disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import torch
from torch import Tensor

from vaopd.errors import EngineError
from vaopd.models.load import save_model
from vaopd.rollouts.vllm_wire import quoted

WRITTEN_FOR = "0.32."  # the versions of vLLM whose request, tensors and flags these modules speak
PATIENCE = 600.0  # seconds for one request: all siblings of a prompt, or one reload
SERVED = "served"  # of the run folder: the student as the server reads it
LONGEST_PROMPT = 4096  # tokens for which `serve_command` leaves room
PAGE = "docs/vllm.md"


class Server:
    """HTTP to one server. Neither proxies of the environment nor redirects are followed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        timeout = httpx2.Timeout(PATIENCE, connect=5.0)
        limits = httpx2.Limits(max_connections=64)
        self._client = httpx2.Client(base_url=self.url, timeout=timeout, limits=limits, trust_env=False, follow_redirects=False)

    def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of a 200 answer. Raises EngineError for anything else."""
        try:
            response = self._client.request(method, path, json=body)
        except httpx2.TimeoutException:
            raise EngineError(f"the vLLM server at {self.url} did not answer {path} within {PATIENCE:.0f} s; look at its log") from None
        except httpx2.HTTPError as error:
            raise EngineError(f"the vLLM server at {self.url} can't be reached ({path}): {quoted(error)}") from None
        if response.status_code != 200:
            raise EngineError(f"the vLLM server at {self.url} answered {path} with {response.status_code}: {quoted(response.text)}")
        return response.content

    def ask_json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """A JSON object."""
        content = self.ask(method, path, body)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise EngineError(
                f"the vLLM server at {self.url} answered {path} with {quoted(content[:400].decode(errors='replace'))}, no JSON object"
            )
        return value

    def alive(self) -> bool:
        """Whether anything at all answers."""
        try:
            self._client.get("/health")
        except httpx2.HTTPError:
            return False
        return True

    def check(self, dtype: torch.dtype) -> None:
        """The version, and the settings that would otherwise change answers without a word. Raises EngineError, naming flags."""
        version = self.ask_json("GET", "/version").get("version")
        if not str(version).startswith(WRITTEN_FOR):
            raise EngineError(f"the server at {self.url} is vLLM {quoted(version)}; this is written for {WRITTEN_FOR}x")
        try:
            config = self.ask_json("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
            found = (config["dtype"], config["logprobs_mode"], config["multimodal_config"]["mm_device_do_normalize"])
        except (EngineError, KeyError, TypeError) as error:
            raise EngineError(
                f"the server at {self.url} doesn't tell its settings ({quoted(error)}). Start it with VLLM_SERVER_DEV_MODE=1: {PAGE}"
            ) from None
        wanted = (str(dtype), "raw_logprobs", False)
        flags = (f"--dtype {_name(dtype)}", "--logprobs-mode raw_logprobs", "--no-mm-device-do-normalize")
        wrong = [flag for is_, want, flag in zip(found, wanted, flags, strict=True) if is_ != want]
        if wrong:
            raise EngineError(f"the server at {self.url} must be started with {' '.join(wrong)}: {PAGE}")

    def load(self, folder: Path, version: str) -> None:
        """Take the weights of a folder and forget what was computed with the ones before; answers name `version` from then on."""
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
        self.ask("POST", "/collective_rpc", arguments)
        self.ask("POST", "/reset_encoder_cache")
        self.ask("POST", "/reset_mm_cache")
        if self.ask_json("POST", "/reset_prefix_cache").get("success") is not True:
            raise EngineError(
                f"the server at {self.url} keeps its prefix cache, as it is still answering somebody else. Give each run its own server"
            )
        self.ask("POST", "/update_weight_version", {"new_version": version})


def write_served(model: Any, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """The student as a folder that the server starts from and reloads: in the precision of the computation, its LM head untied.

    vLLM 0.32.0 on a CPU goes on with the old head after a reload when head and embeddings are one tensor. A killed write leaves the
    folder before it or none.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(model, processor, unfinished, state={name: _own(tensor, dtype) for name, tensor in model.state_dict().items()})
    _describe(unfinished / "config.json", dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, so that tied tensors are saved under both names."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _describe(file: Path, dtype: torch.dtype) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if part is values or "dtype" in part:
            part["dtype"] = _name(dtype)
        if part is values or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def serve_command(folder: Path, url: str, dtype: torch.dtype, max_tokens: int, context: int | None) -> str:
    """The line that starts a server of the kind that `Server.check` accepts."""
    address = urlsplit(url)
    length = min(max_tokens + LONGEST_PROMPT, context or max_tokens + LONGEST_PROMPT)
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(str(folder.absolute()))} --host {address.hostname} --port {address.port or 80} "
        f"--dtype {_name(dtype)} --max-model-len {length} --enable-scale-out --no-mm-device-do-normalize"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
