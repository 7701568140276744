"""The hidden states that predict the responses, from one packed row: each prompt once, with its siblings behind it.

    [prompt 1 | y11 | y12 | … | prompt 2 | y21 | y22 | …]        M = sum of P + sum of max(T - 1, 0) tokens, no padding

A sibling sees its prompt and itself, so the states and all gradients are those of `vaopd.models.forward.rows` (one row per rollout)
in exact algebra, for a fraction of its tokens. The last token of a response predicts nothing and is left out.

The attention is split: each prompt attends to itself causally, then each sibling's queries attend to [prompt ; own tokens]. No mask
over M × M is formed, and everything but the attention works on the packed row itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vaopd.models.families import family_of, position_ids
from vaopd.models.forward import continue_positions, padded_tokens, rows, view_images
from vaopd.types import Group, Prompt

log = logging.getLogger(__name__)

NAME = "vaopd_split"  # of the attention function, in transformers' registry
LAYOUT = "vaopd_layout"  # the keyword argument of the model's forward that carries the layout to the attention function
# Groups are attended together, padded to the longest, until their siblings have this many tokens: short ones would spend their time
# on calls, long ones on padding.
TOGETHER = 1024
LEAST_RATIO = 1.3  # tokens apart over tokens packed, from which sharing a prompt pays


def shared(model: Any, groups: Sequence[Group], view: str) -> Tensor:
    """(N, H) hidden states that predict the response tokens of all groups, flat, in order: what `rows` returns.

    Args:
        model: a Hugging Face image-text-to-text model for which `why_not_shared` has no objection.
        groups: rendered prompts with any number of siblings; empty responses are allowed.
        view: which rendering of the images the model sees.

    Raises:
        ValueError: the family can't share prompts, a response contains an image token, or the prompt lacks the view.
    """
    family, device = family_of(model), model.device
    if family.not_shared is not None:
        raise ValueError(f"siblings can't share their prompt in a {family.title} model: {family.not_shared}. Use `rows`")
    if (prompt := _image_in_response(model, groups)) is not None:
        raise ValueError(f"a response to prompt '{prompt}' contains image tokens. A packed row has images in its prompts only; use `rows`")
    packed = pack(groups, [family.prompt_positions(model, group.prompt) for group in groups])
    prompts = [group.prompt for group in groups]
    images = family.encode_images(model, prompts, [view_images(prompt, view) for prompt in prompts], [1] * len(prompts))
    switch_attention(model)
    body = model.model(
        input_ids=packed.ids_M[None].to(device),
        # Already four-dimensional, so no mask is made of it; and of no size that an attention without the layout could use.
        attention_mask=torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device),
        position_ids=position_ids(packed.positions_AM[:, None]).to(device),
        use_cache=False,
        **{LAYOUT: split_layout(packed.spans).to(device)},
        **images,
    )
    return body.last_hidden_state[0].index_select(0, packed.predicting_N.to(device))


def packed_tokens(groups: Sequence[Group]) -> int:
    """Prompt and response tokens with every prompt once: Σ (P + Σ T)."""
    return sum(len(group.prompt.ids_P) + sum(group.lengths) for group in groups)


def token_ratio(groups: Sequence[Group]) -> float:
    """Tokens of prompts and responses, one row per rollout, over those with every prompt once: Σ K(P + T) / Σ (P + Σ T)."""
    apart = sum(len(group.prompt.ids_P) + length for group in groups for length in group.lengths)
    return apart / max(packed_tokens(groups), 1)


def _image_in_response(model: Any, groups: Sequence[Group]) -> str | None:
    """The id of the first prompt to which a response contains an image token."""
    token = getattr(model.config, "image_token_id", -1)
    if not any(group.responses for group in groups) or not bool((torch.cat([group.ids_N for group in groups]) == token).any()):
        return None
    return next((group.prompt.id for group in groups for response in group.responses if token in response), None)


# --- the packed row ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Where one group lies in the packed row."""

    prompt: range
    siblings: tuple[range, ...]  # K of max(T - 1, 0) tokens


@dataclass(frozen=True)
class Packed:
    """All groups in one row."""

    ids_M: Tensor  # (M,) int64
    positions_AM: Tensor  # (A, M) int64, on the model's A axes
    predicting_N: Tensor  # (N,) where in the row the state is that predicts each response token
    spans: tuple[Spans, ...]  # one per group


def pack(groups: Sequence[Group], positions: Sequence[Tensor]) -> Packed:
    """Lay the groups out in one row; `positions` are the (A, P) position ids of each prompt."""
    ids: list[Tensor] = []
    places: list[Tensor] = []
    predicting: list[Tensor] = []
    spans: list[Spans] = []
    end = 0
    for group, positions_AP in zip(groups, positions, strict=True):
        prompt = range(end, end := end + len(group.prompt.ids_P))
        siblings = [range(end, end := end + max(len(response) - 1, 0)) for response in group.responses]
        spans.append(Spans(prompt, tuple(siblings)))
        ids += [group.prompt.ids_P, *(response[:-1] for response in group.responses)]
        # Every sibling goes on from the prompt, as if the others were not there.
        places += [positions_AP, *(continue_positions(positions_AP, len(own))[:, len(prompt) :] for own in siblings)]
        for response, own in zip(group.responses, siblings, strict=True):
            if len(response):  # the prompt's last state predicts the first token of every sibling
                predicting.append(torch.tensor([prompt.stop - 1, *own]))
    nothing = torch.empty(0, dtype=torch.long)
    return Packed(torch.cat(ids), torch.cat(places, dim=1), torch.cat([nothing, *predicting]), tuple(spans))


# --- which token attends to which -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Groups that are attended together: their b prompts padded to P tokens, their r siblings padded to T."""

    prompts: tuple[int, int]  # (b, P)
    siblings: tuple[int, int]  # (r, T); r counts the siblings with a token in the row
    visible: Tensor  # (r or 1, 1, T, P + T) bool: the keys of [prompt ; own] that each token of a sibling sees

    @property
    def keys(self) -> tuple[int, int]:
        """(r, P + T) of [prompt ; own]."""
        return self.siblings[0], self.prompts[1] + self.siblings[1]


@dataclass(frozen=True)
class Layout:
    """How the attention reads the packed row and writes it back. Padding reads token 0, and nothing reads what becomes of it."""

    queries: Tensor  # int64, block after block: the place in the row of each prompt token (b·P), then of each sibling token (r·T)
    keys: Tensor  # int64, block after block: of each prompt token (b·P), then for each sibling of [prompt ; own] (r·(P + T))
    results: Tensor  # (M,) int64: where each token of the row is among `queries`
    blocks: tuple[Block, ...]

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        blocks = tuple(replace(block, visible=block.visible.to(device)) for block in self.blocks)
        return Layout(self.queries.to(device), self.keys.to(device), self.results.to(device), blocks)


def split_layout(spans: Sequence[Spans]) -> Layout:
    """The layout of a packed row."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    blocks: list[Block] = []
    for batch in _together(spans):
        prompts_bP = _padded([group.prompt for group in batch])
        own_rT = _padded([own for group in batch for own in group.siblings if own])
        owner_r = torch.tensor([index for index, group in enumerate(batch) for own in group.siblings if own], dtype=torch.long)
        queries += [prompts_bP.flatten(), own_rT.flatten()]
        keys += [prompts_bP.flatten(), torch.cat([prompts_bP[owner_r], own_rT], dim=1).flatten()]
        blocks.append(Block(_shape(prompts_bP), _shape(own_rT), visible_keys(prompts_bP[owner_r], own_rT.shape[1])))
    places = torch.cat(queries)
    results_M = torch.empty(int(places.max()) + 1, dtype=torch.long)
    results_M[places[places >= 0]] = torch.arange(len(places))[places >= 0]
    return Layout(places.clamp(min=0), torch.cat(keys).clamp(min=0), results_M, tuple(blocks))


def visible_keys(prompts_rP: Tensor, T: int) -> Tensor:
    """(r or 1, 1, T, P + T) True where a sibling's token sees a key: the whole prompt, itself, and its own tokens before it.

    Args:
        prompts_rP: each sibling's prompt, negative where it is padding; without padding one mask serves all siblings.
        T: length of the padded siblings.
    """
    prompt_rP = prompts_rP >= 0
    if prompt_rP.all():
        prompt_rP = prompt_rP[:1]
    count, P = prompt_rP.shape
    own = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.cat([prompt_rP[:, None, None, :].expand(count, 1, T, P), own.expand(count, 1, T, T)], dim=3)


def _together(spans: Sequence[Spans]) -> Iterator[list[Spans]]:
    """Consecutive groups whose padded siblings have at most TOGETHER tokens, or a single group."""
    batch: list[Spans] = []
    for group in spans:
        lengths = [len(own) for member in (*batch, group) for own in member.siblings if own]
        if batch and len(lengths) * max(lengths, default=0) > TOGETHER:
            yield batch
            batch = []
        batch.append(group)
    yield batch


def _padded(runs: Sequence[range]) -> Tensor:
    """(len(runs), longest) the places of each run, -1 behind its end."""
    if not runs:
        return torch.empty(0, 0, dtype=torch.long)
    return pad_sequence([torch.arange(run.start, run.stop) for run in runs], batch_first=True, padding_value=-1)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


# --- the attention function and its place in the model ----------------------------------------------------------------


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    vaopd_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, M, heads, D) attention of a packed row: query (1, heads, M, D), key and value (1, key heads, M, D).

    Without a layout it is transformers' own attention, mask and all.
    """
    if vaopd_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    blocks, results = vaopd_layout.blocks, []
    asked = [shape for block in blocks for shape in (block.prompts, block.siblings)]
    seen = [shape for block in blocks for shape in (block.prompts, block.keys)]
    queries = _pieces(query, vaopd_layout.queries, asked)
    keys, values = (_pieces(x, vaopd_layout.keys, seen) for x in (key, value))
    masks = [mask for block in blocks for mask in (None, block.visible)]  # a prompt is causal, and its padding comes after it
    for q, k, v, mask in zip(queries, keys, values, masks, strict=True):
        if len(q):
            out, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)
            results.append(out.flatten(0, 1))
    return torch.cat(results).index_select(0, vaopd_layout.results)[None], None


def _pieces(x: Tensor, places: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tokens of (1, heads, M, D) in pieces (count, heads, length, D): one gather of all, so the backward scatters once."""
    pieces = x[0].transpose(0, 1).index_select(0, places).split([count * length for count, length in shapes])
    return [piece.unflatten(0, shape).transpose(1, 2) for piece, shape in zip(pieces, shapes, strict=True)]


AttentionInterface.register(NAME, split_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def switch_attention(model: Any) -> None:
    """Let the decoder's attention modules use `split_attention` when, and only while, they are called with a layout.

    Hooks of those modules rather than a switch around the model's forward: gradient checkpointing calls the layers once more in the
    backward, where such a switch would be off.
    """
    for layer in model.get_decoder().layers:
        if _switch_on not in layer.self_attn._forward_pre_hooks.values():
            layer.self_attn.register_forward_pre_hook(_switch_on, with_kwargs=True)
            layer.self_attn.register_forward_hook(_switch_back, with_kwargs=True, always_call=True)


def _switch_on(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if LAYOUT in kwargs and module.config._attn_implementation != NAME:
        module.attention_without_layout = module.config._attn_implementation
        module.config._attn_implementation = NAME


def _switch_back(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if LAYOUT in kwargs:
        module.config._attn_implementation = module.attention_without_layout


# --- where it doesn't hold, and the choice ----------------------------------------------------------------------------


ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", NAME)  # plain causal attention, computed in different ways
CHECKED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # largest relative difference of a token's state


def why_not_shared(model: Any) -> str | None:
    """Why siblings cannot share their prompt in this model, in the mode it is in; None if nothing is known against it."""
    return next((reason for object_to in _OBJECTIONS if (reason := object_to(model)) is not None), None)


def _family(model: Any) -> str | None:
    return family_of(model).not_shared


def _attention(model: Any) -> str | None:
    config = model.config.get_text_config()
    if (name := config._attn_implementation) not in ATTENTIONS:
        return f"its attention implementation '{name}' is none of {', '.join(ATTENTIONS[:-1])}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention scores (attn_logit_softcapping)"
    if any(getattr(module, "sinks", None) is not None for module in model.get_decoder().modules()):
        return "it has attention sinks"
    return None


def _layers(model: Any) -> str | None:
    config = model.config.get_text_config()
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        return f"it has layers without full attention: {', '.join(other)}"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return f"it attends in a sliding window of {config.sliding_window} tokens"
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        return "it has linear-attention or recurrent layers, or none that are known as layers with `self_attn`"
    return None


def _both_ways(model: Any) -> str | None:
    config = model.config.get_text_config()
    both = getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True)
    return "its tokens see what comes after them" if both else None


def _experts(model: Any) -> str | None:
    config = model.config.get_text_config()
    if any("capacity" in name and value is not None for name, value in vars(config).items()):
        return "its experts have a capacity, for which the tokens of a row compete"
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if experts and getattr(config, "output_router_logits", False):
        return "its experts have a loss over all tokens of a row (output_router_logits)"
    return None


def _dropout(model: Any) -> str | None:
    rates = [module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0) for module in model.modules()]
    return f"it is trained with dropout {max(rates)}" if model.training and max(rates) > 0 else None


_OBJECTIONS: tuple[Callable[[Any], str | None], ...] = (_family, _attention, _layers, _both_ways, _experts, _dropout)


class Auto:
    """A ResponseForward: `shared` where it saves enough tokens and gives what `rows` gives, else `rows`.

    The first call with a model, and the first in its other mode (training or not), compares both on one small group. A model that
    cannot share, or differs, gets rows from then on and a warning.

    Args:
        least_ratio: the token ratio from which sharing pays.
    """

    def __init__(self, least_ratio: float = LEAST_RATIO) -> None:
        self.least_ratio = least_ratio
        self._reasons: WeakKeyDictionary[nn.Module, dict[bool, str | None]] = WeakKeyDictionary()  # by the model's mode
        self._checked: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()

    def __call__(self, model: Any, groups: Sequence[Group], view: str) -> Tensor:
        """(N, H) over all groups, in order."""
        # Before the ratio is looked at: processes that share the model's weights between them must all check, or none.
        self._check(model, groups, view)
        return (shared if self._shares(model, groups) else rows)(model, groups, view)

    def tokens(self, model: Any, groups: Sequence[Group]) -> int:
        """What a call with these groups sends through the model: each prompt once where they share it, else padded rows.

        It never depends on whether the check has run, so a resumed run cuts the same micro-batches; a model that fails the check gets
        rows in a batch that was cut for sharing, once.
        """
        return packed_tokens(groups) if self._shares(model, groups) else padded_tokens(groups)

    def _shares(self, model: Any, groups: Sequence[Group]) -> bool:
        pays = token_ratio(groups) >= self.least_ratio
        return pays and self._reason(model) is None and _image_in_response(model, groups) is None

    def _reason(self, model: Any) -> str | None:
        """Why this model, in this mode, gets rows: as far as is known."""
        known = self._reasons.setdefault(model, {})
        if model.training not in known:
            known[model.training] = why_not_shared(model)
        return known[model.training]

    def _check(self, model: Any, groups: Sequence[Group], view: str) -> None:
        done = self._checked.setdefault(model, set())
        if model.training in done:
            return
        done.add(model.training)
        reason = self._reasons[model][model.training] = self._reason(model) or _differs(model, groups, view)
        if reason is not None:
            log.warning(
                "siblings do not share their prompt in this %s: %s. They are computed row by row: the same result, more slowly.",
                type(model).__name__,
                reason,
            )


def _differs(model: Any, groups: Sequence[Group], view: str) -> str | None:
    """How far both ways are apart on one group, if further than rounding explains."""
    group = probe(model, [group.prompt for group in groups])
    # Weights in full precision are compared in it: autocast would only blur the comparison.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        expected_NH, found_NH = (way(model, [group], view) for way in (rows, shared))
    bound = CHECKED.get(expected_NH.dtype, CHECKED[torch.float32])
    difference_N = (found_NH - expected_NH).float().norm(dim=1) / expected_NH.float().norm(dim=1)
    worst = float(difference_N.max())
    return (
        None
        if worst <= bound
        else f"a token's state differs by {worst:.1e} of its size from that of a row of its own (at most {bound:.0e})"
    )


def probe(model: Any, prompts: Sequence[Prompt], tokens: int = 24) -> Group:
    """Two ragged siblings to the first prompt with an image, or the first at all, made of its own text."""
    prompt = next((prompt for prompt in prompts if prompt.images), prompts[0])
    text = prompt.ids_P[prompt.ids_P != getattr(model.config, "image_token_id", -1)]
    ids = text.repeat(-(-tokens // len(text)))[:tokens]
    return Group(prompt, (ids, ids.flip(0)[: tokens // 2]), (True, True))
