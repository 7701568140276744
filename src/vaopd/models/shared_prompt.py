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
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vaopd.models.families import family_of
from vaopd.models.forward import continue_positions, rows, view_images
from vaopd.types import Group

log = logging.getLogger(__name__)

NAME = "vaopd_split"  # of the attention function, in transformers' registry
LAYOUT = "vaopd_layout"  # the keyword argument of the model's forward that carries the layout to the attention function
# Prompts are attended together, padded to the longest, until their siblings have this many query tokens: a small model's time is
# otherwise spent on calls, and a large one's on padding.
TOGETHER = 8192


def shared(model: Any, groups: Sequence[Group], view: str) -> Tensor:
    """(N, H) hidden states that predict the response tokens of all groups, flat, in order: what `rows` returns.

    Args:
        model: a Hugging Face image-text-to-text model for which `why_not_shared` has no objection.
        groups: rendered prompts with any number of siblings; empty responses are allowed.
        view: which rendering of the images the model sees.

    Raises:
        ValueError: a response contains an image token, or the prompt lacks the view.
    """
    family, device = family_of(model), model.device
    _check_responses(model, groups)
    packed = pack(groups, [family.prompt_positions(model, group.prompt) for group in groups])
    images = family.encode_images(model, [view_images(group.prompt, view) for group in groups], [1] * len(groups))
    switch_attention(model)
    body = model.model(
        input_ids=packed.ids_M[None].to(device),
        # Already four-dimensional, so no mask is made of it; and of no size that an attention without the layout could use.
        attention_mask=torch.empty(1, 1, 0, 0, device=device),
        position_ids=packed.positions_AM[:, None].to(device),
        use_cache=False,
        **{LAYOUT: split_layout(packed.spans).to(device)},
        **images,
    )
    return body.last_hidden_state[0].index_select(0, packed.predicting_N.to(device))


def _check_responses(model: Any, groups: Sequence[Group]) -> None:
    image_token = getattr(model.config, "image_token_id", None)
    for group in groups:
        if any(bool((response == image_token).any()) for response in group.responses):
            raise ValueError(f"a response to prompt '{group.prompt.id}' contains the image token {image_token}; images belong into prompts")


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
    positions_AM: Tensor  # (A, M) position ids on A axes
    predicting_N: Tensor  # (N,) the place in the row whose state predicts each response token
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
    """Groups that are attended together: b prompts padded to P tokens, their r siblings padded to T."""

    prompts: tuple[int, int]  # (b, P)
    siblings: tuple[int, int]  # (r, T); (0, 0) without any
    visible: Tensor | None  # (r or 1, 1, T, P + T) bool: which keys of [prompt ; own] a sibling's token sees; None without siblings


@dataclass(frozen=True)
class Layout:
    """How the attention reads the packed row and writes it again. Padding reads token 0; nothing reads what becomes of it."""

    queries: Tensor  # block after block: the row's index of each prompt token (b·P), then of each sibling token (r·T)
    keys: Tensor  # block after block: of each prompt token (b·P), then for each sibling of [prompt ; own] (r·(P + T))
    results: Tensor  # (M,) where each token of the row is found among the queries
    blocks: tuple[Block, ...]

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        blocks = tuple(Block(b.prompts, b.siblings, None if b.visible is None else b.visible.to(device)) for b in self.blocks)
        return Layout(self.queries.to(device), self.keys.to(device), self.results.to(device), blocks)


def split_layout(spans: Sequence[Spans]) -> Layout:
    """The layout of a packed row."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    blocks: list[Block] = []
    for batch in _together(spans):
        prompts_bP = _padded([group.prompt for group in batch])
        owner_r = torch.tensor([index for index, group in enumerate(batch) for own in group.siblings if own], dtype=torch.long)
        queries.append(prompts_bP.flatten())
        keys.append(prompts_bP.flatten())
        if not len(owner_r):
            blocks.append(Block(_shape(prompts_bP), (0, 0), None))
            continue
        own_rT = _padded([own for group in batch for own in group.siblings if own])
        queries.append(own_rT.flatten())
        keys.append(torch.cat([prompts_bP[owner_r], own_rT], dim=1).flatten())
        prompt_r = torch.tensor([len(group.prompt) for group in batch])[owner_r]
        blocks.append(Block(_shape(prompts_bP), _shape(own_rT), visible_keys(prompt_r, prompts_bP.shape[1], own_rT.shape[1])))
    queries_Q = torch.cat(queries)
    results_M = torch.empty(int(queries_Q.max()) + 1, dtype=torch.long)
    real = queries_Q >= 0
    results_M[queries_Q[real]] = torch.arange(len(queries_Q))[real]
    return Layout(queries_Q.clamp(min=0), torch.cat(keys).clamp(min=0), results_M, tuple(blocks))


def visible_keys(prompt_r: Tensor, P: int, T: int) -> Tensor:
    """(r or 1, 1, T, P + T) True where a sibling's token sees a key: its whole prompt without the padding, itself and what it follows.

    Args:
        prompt_r: length of each sibling's prompt; equal lengths give one mask for all.
        P: length of the padded prompts.
        T: length of the padded siblings.
    """
    lengths = prompt_r[:1] if bool((prompt_r == prompt_r[0]).all()) else prompt_r
    prompt = (torch.arange(P) < lengths[:, None])[:, None, None, :].expand(-1, 1, T, P)
    own = torch.ones(T, T, dtype=torch.bool).tril().expand(len(lengths), 1, T, T)
    return torch.cat([prompt, own], dim=3)


def _together(spans: Sequence[Spans]) -> Iterator[list[Spans]]:
    """Consecutive groups until the padded siblings have more than TOGETHER tokens."""
    batch: list[Spans] = []
    count = longest = 0
    for group in spans:
        count += sum(1 for own in group.siblings if own)
        longest = max([longest, *(len(own) for own in group.siblings)])
        if batch and count * longest > TOGETHER:
            yield batch
            batch, count, longest = [], sum(1 for own in group.siblings if own), max((len(own) for own in group.siblings), default=0)
        batch.append(group)
    yield batch


def _padded(runs: Sequence[range]) -> Tensor:
    """(len(runs), longest) the indices of each run, -1 behind its end."""
    return pad_sequence([torch.arange(run.start, run.stop) for run in runs], batch_first=True, padding_value=-1)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


# --- the attention function and its place in the model ----------------------------------------------------------------


def split_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, vaopd_layout: Layout, **kwargs: Any
) -> tuple[Tensor, None]:
    """(1, M, heads, D) attention of a packed row; query (1, heads, M, D), key and value (1, key heads, M, D)."""
    del attention_mask  # the layout says it all
    sizes = [(block.prompts, block.siblings, (block.siblings[0], sum((block.prompts[1], block.siblings[1])))) for block in vaopd_layout.blocks]
    queries = _gather(query, vaopd_layout.queries, [shape for p, s, _ in sizes for shape in (p, s)])
    keys = _gather(key, vaopd_layout.keys, [shape for p, _, k in sizes for shape in (p, k)])
    values = _gather(value, vaopd_layout.keys, [shape for p, _, k in sizes for shape in (p, k)])
    results = []
    for block in vaopd_layout.blocks:
        for visible in (None, block.visible):
            q, k, v = next(queries), next(keys), next(values)
            if len(q):
                out, _ = sdpa_attention_forward(module, q, k, v, visible, is_causal=visible is None, **kwargs)
                results.append(out.flatten(0, 1))
    return torch.cat(results).index_select(0, vaopd_layout.results)[None], None


def _gather(x: Tensor, index: Tensor, shapes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Tokens of (1, heads, M, D) by index, cut into pieces (rows, heads, length, D): one gather, so one scatter in the backward."""
    pieces = x[0].transpose(0, 1).index_select(0, index).split([count * length for count, length in shapes])
    return (piece.unflatten(0, shape).transpose(1, 2) for piece, shape in zip(pieces, shapes, strict=True))


AttentionInterface.register(NAME, split_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def switch_attention(model: Any) -> None:
    """Let the decoder's attention modules use `split_attention` when, and only while, they are called with a layout.

    Hooks of the attention modules rather than one switch around the model's forward: gradient checkpointing calls the layers again
    in the backward, when such a switch would be off.
    """
    for layer in model.get_decoder().layers:
        module = layer.self_attn
        if _switch_on not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_switch_on, with_kwargs=True)
            module.register_forward_hook(_switch_back, with_kwargs=True, always_call=True)


def _switch_on(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if LAYOUT in kwargs and module.config._attn_implementation != NAME:
        module.attention_without_layout = module.config._attn_implementation
        module.config._attn_implementation = NAME


def _switch_back(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if LAYOUT in kwargs:
        module.config._attn_implementation = module.attention_without_layout
