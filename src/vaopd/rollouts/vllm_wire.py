"""What is said to a vLLM server and read from it: prompts and images as numbers, answers as numbers, both checked.

vLLM 0.32's `/inference/v1/generate` takes token ids and, for each image, the tensors that the processor made, in vLLM's own serialisation
(`vllm/v1/serial_utils.py`, MsgpackDecoder). So the server neither tokenises nor expands nor resizes anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from vaopd.errors import EngineError
from vaopd.models.forward import view_images
from vaopd.rollouts.hf import Sampling, rollout_seed
from vaopd.types import ORIGINAL, Group, Prompt

FORBIDDEN = -1e9  # added to a logit: its probability is then 0 in fp32
MOST_FORBIDDEN = 1024  # as many biases as vLLM takes (MAX_NUM_LOGIT_BIAS_TOKENS)
SHOWN = 300  # characters of a server's text in a message
RAW = 3  # vLLM's msgpack extension for a tensor's bytes


@dataclass(frozen=True)
class Rules:
    """What holds for every prompt of a run."""

    sampling: Sampling
    eos_ids: frozenset[int]
    rows: int  # of the LM head: ids are below it
    forbidden_ids: frozenset[int]  # never sampled, as the rows of the LM head that pad the vocabulary
    image_id: int  # the placeholder's
    merge: int  # side of the square of patches that becomes one placeholder


def request(prompt: Prompt, k: int, step: int, rules: Rules) -> dict[str, Any]:
    """The JSON body that asks for K siblings. vLLM gives sibling i the seed plus i."""
    sampling = rules.sampling
    body: dict[str, Any] = {
        "token_ids": prompt.ids_P.tolist(),
        "return_token_ids": True,
        "sampling_params": {
            "n": k,
            "seed": rollout_seed(sampling.seed, step, prompt.id, 0) >> 1,  # room below 2**63 for the siblings
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "ignore_eos": True,  # the server's own idea of an end; ours is the next line
            "stop_token_ids": sorted(rules.eos_ids),
            "logit_bias": {str(index): FORBIDDEN for index in sorted(rules.forbidden_ids)},
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        },
    }
    if prompt.images:
        body["features"] = features(prompt, rules)
    return body


def features(prompt: Prompt, rules: Rules) -> dict[str, Any]:
    """The images' tensors, where each stands, and a name for each under which the server keeps what its vision tower makes of it."""
    view = view_images(prompt, ORIGINAL)
    grids = view["image_grid_thw"]
    parts = view["pixel_values"].split(grids.prod(-1).tolist())
    items = [pack(_image(part, grid)) for part, grid in zip(parts, grids, strict=True)]
    return {
        "mm_hashes": {"image": [hashlib.sha256(item).hexdigest() for item in items]},
        "mm_placeholders": {"image": places(prompt, rules)},
        "kwargs_data": {"image": [base64.b64encode(item).decode("ascii") for item in items]},
    }


def places(prompt: Prompt, rules: Rules) -> list[dict[str, int]]:
    """Offset and length of each image's placeholders. Raises EngineError where they are no run of the length that its grid asks for."""
    if not prompt.images:
        return []
    ids, start, found = prompt.ids_P.tolist(), 0, []
    for patches in view_images(prompt, ORIGINAL)["image_grid_thw"].prod(-1).tolist():
        length = patches // rules.merge**2
        offset = ids.index(rules.image_id, start) if rules.image_id in ids[start:] else len(ids)
        start = offset + length
        if ids[offset:start] != [rules.image_id] * length:
            break
        found.append({"offset": offset, "length": length})
    if sum(place["length"] for place in found) != ids.count(rules.image_id):
        raise EngineError(
            f"example '{prompt.id}': its {ids.count(rules.image_id)} image placeholders are not the ones that its pictures ask for. "
            "The processor belongs to another model"
        )
    return found


def _image(pixels: Tensor, grid: Tensor) -> dict[str, Any]:
    """One image as vLLM's Qwen-VL models keep it (`_create_qwen2vl_field_factory`)."""
    whole = {"slices": [[0, len(pixels), 1]], "dim": 0, "keep_on_cpu": False}
    return {
        "pixel_values": {"data": _tensor(pixels), "field": ["flat", whole]},
        "image_grid_thw": {"data": _tensor(grid), "field": ["batched", {"keep_on_cpu": True}]},
    }


def _tensor(tensor: Tensor) -> list[Any]:
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw]


def pack(value: Any) -> bytes:
    """msgpack of what an image consists of; bytes become vLLM's extension for raw tensors (https://github.com/msgpack/msgpack, spec.md)."""
    match value:
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return b"\xd3" + struct.pack(">q", value)
        case str():
            text = value.encode()
            return b"\xdb" + struct.pack(">I", len(text)) + text
        case bytes():
            return b"\xc9" + struct.pack(">Ib", len(value), RAW) + value
        case dict():
            return b"\xdf" + struct.pack(">I", len(value)) + b"".join(pack(key) + pack(part) for key, part in value.items())
        case list():
            return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    raise TypeError(f"an image has no {type(value).__name__}")


class _Span(BaseModel):
    version: str


class _Token(BaseModel):
    token_id: int
    logprob: float


class _LogProbs(BaseModel):
    content: list[_Token]


class _Choice(BaseModel):
    index: int
    token_ids: list[int]
    finish_reason: str
    logprobs: _LogProbs
    weight_versions: list[_Span]


class _Place(BaseModel):
    offset: int
    length: int


class _Answer(BaseModel):
    """The parts of vLLM's GenerateTokensResponse that are read."""

    prompt_token_ids: list[int]
    mm_placeholders: dict[str, list[_Place]] | None = None
    choices: list[_Choice]


def read_answer(content: bytes, prompt: Prompt, k: int, rules: Rules, version: str) -> Group:
    """The K siblings of a prompt, after everything that could silently be otherwise was compared.

    Raises:
        EngineError: names the example and what differs: the prompt's ids or placeholders, the number of answers, an answer's ids, ends,
            length or log-probabilities, or the weights that it was sampled from.
    """
    try:
        answer = _Answer.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise EngineError(f"example '{prompt.id}': the server's answer can't be read: {quoted(where)}: {quoted(first['msg'])}") from None
    _check_prompt(answer, prompt, rules)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(k)):
        raise EngineError(f"example '{prompt.id}': {k} answers were asked for, the server gave {len(choices)}")
    for choice in choices:
        if problem := _problem(choice, rules, version):
            raise EngineError(f"example '{prompt.id}', answer {choice.index}: {problem}")
    return Group(
        prompt,
        tuple(torch.tensor(choice.token_ids, dtype=torch.long) for choice in choices),
        tuple(choice.token_ids[-1] in rules.eos_ids for choice in choices),
        served_logp_N=torch.tensor([token.logprob for choice in choices for token in choice.logprobs.content]),
    )


def _check_prompt(answer: _Answer, prompt: Prompt, rules: Rules) -> None:
    ours, theirs = prompt.ids_P.tolist(), answer.prompt_token_ids
    if ours != theirs:
        count = f"{theirs.count(rules.image_id)} image placeholders, not {ours.count(rules.image_id)}"
        raise EngineError(
            f"example '{prompt.id}': the server answered another prompt: {len(theirs)} tokens, not {len(ours)}; {count}. "
            "It is set up for another model or version: docs/vllm.md"
        )
    found = [place.model_dump() for place in (answer.mm_placeholders or {}).get("image", [])]
    if found != (expected := places(prompt, rules)):
        raise EngineError(f"example '{prompt.id}': the server put images to {found}, but they stand at {expected}")


def _problem(choice: _Choice, rules: Rules, version: str) -> str | None:
    """What is wrong with an answer, None for nothing."""
    ids, limit = choice.token_ids, rules.sampling.max_tokens
    stated = [token.logprob for token in choice.logprobs.content]
    ended = bool(ids) and ids[-1] in rules.eos_ids
    labels = {span.version for span in choice.weight_versions}
    if labels != {version}:
        return f"it comes from weights {quoted(', '.join(sorted(labels)))}, not {version}: another run uses the server, or it was restarted"
    if not ids or len(ids) > limit or not rules.eos_ids.isdisjoint(ids[:-1]):
        return f"{len(ids)} tokens of at most {limit}, with an end of the response {'before' if ids else 'in place of'} the last one"
    if choice.finish_reason != ("stop" if ended else "length"):
        return f"the server ended it for {quoted(choice.finish_reason)}"
    if not ended and len(ids) < limit:
        return f"it was cut at {len(ids)} of {limit} tokens. Start the server with a larger --max-model-len, or lower rollouts.max_tokens"
    if wrong := sorted(index for index in set(ids) if not 0 <= index < rules.rows or index in rules.forbidden_ids):
        return f"it has the control ids {wrong[:5]}, or ids beyond the LM head's {rules.rows}, which were not to be sampled"
    if [token.token_id for token in choice.logprobs.content] != ids or not all(math.isfinite(logp) and logp <= 0 for logp in stated):
        return f"{len(ids)} tokens, but not a log-probability for each of them"
    return None


def quoted(text: Any) -> str:
    """A server's text as it may stand in a message: short, on one line, without control characters."""
    whole = str(text)
    return json.dumps(whole[:SHOWN]) + ("…" if len(whole) > SHOWN else "")


def forbidden_ids(control: Sequence[int] | frozenset[int], vocab_size: int, rows: int) -> frozenset[int]:
    """The control ids and the LM head's rows beyond the vocabulary. Raises EngineError for more than vLLM takes."""
    found = frozenset(control) | frozenset(range(vocab_size, rows))
    if len(found) > MOST_FORBIDDEN:
        raise EngineError(
            f"{len(found)} ids must not be sampled (control ids and {rows - vocab_size} rows that pad the LM head), vLLM takes "
            f"{MOST_FORBIDDEN}. Use rollouts.engine: hf"
        )
    return found
