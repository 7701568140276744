"""Views side by side: the same responses scored under each, and a picture of what each makes of one image.

`python -m vaopd.analysis.view_table docs/views.png` draws the picture.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vaopd.core import visual_advantage, visual_tokens
from vaopd.data.render import Renderer
from vaopd.evaluate.runner import advantage_summary
from vaopd.train.step import layout
from vaopd.types import DEGRADED, ORIGINAL, Example, Group, Prompt, Teacher
from vaopd.views import VIEWS, View, view
from vaopd.world.questions import sample_figure

QUESTIONS_AT_ONCE = 16  # scored together: bounds the hidden states that are held
TILE, GAP, CAPTION = 192, 8, 26  # pixels of the picture


def view_table(
    teacher: Teacher,
    processor: Any,
    examples: Sequence[Example],
    groups: Sequence[Group],
    views: Mapping[str, View],
    reference_N: Tensor,
    deadband: float,
) -> dict[str, dict[str, float | None]]:
    """Visual advantage of the same responses under each view.

    Args:
        examples: the questions, in any order; found by the id of a group's prompt.
        groups: responses without empty ones.
        reference_N: (N,) the advantages under the view that the others are compared with.
        deadband: nats; an advantage below it counts as 0.

    Returns:
        view -> `va` (mean, nats per token), `va_top10` (share of its mass in the top 10 % of tokens), `same_tokens` (share of the top
        20 % of each response's tokens that the reference puts there too); None where there is no advantage at all.
    """
    by_id = {example.id: example for example in examples}
    renderers = {name: Renderer(processor, degrade) for name, degrade in views.items()}
    advantages: dict[str, list[Tensor]] = {name: [] for name in views}
    for start in range(0, len(groups), QUESTIONS_AT_ONCE):
        batch = [_with_views(group, by_id[group.prompt.id], renderers) for group in groups[start : start + QUESTIONS_AT_ONCE]]
        scores = teacher.score(batch, (ORIGINAL, *views))
        logp_N = {name: torch.cat([score.logp_N[name] for score in scores]) for name in (ORIGINAL, *views)}
        for name in views:
            advantages[name].append(visual_advantage(logp_N[ORIGINAL], logp_N[name], deadband=deadband).cpu())
    rollout_N, _ = layout(groups)
    reference_visual_N = visual_tokens(reference_N, rollout_N)
    return {name: _row(torch.cat(parts), reference_visual_N, rollout_N) for name, parts in advantages.items()}


def _row(a_N: Tensor, reference_visual_N: Tensor, rollout_N: Tensor) -> dict[str, float | None]:
    visual_N = visual_tokens(a_N, rollout_N)
    same = float((visual_N & reference_visual_N).sum() / visual_N.sum()) if visual_N.any() else None
    return {**advantage_summary(a_N), "same_tokens": same}


def _with_views(group: Group, example: Example, renderers: Mapping[str, Renderer]) -> Group:
    """The group with its prompt's images under every view, by the view's name."""
    degraded = {name: renderer(example, [DEGRADED]).images[DEGRADED] for name, renderer in renderers.items()}
    images = {ORIGINAL: group.prompt.images[ORIGINAL], **degraded}
    return Group(Prompt(example.id, group.prompt.ids_P, images), group.responses, group.ended_K)


def strip(image: Image.Image, views: Mapping[str, View]) -> Image.Image:
    """The image and each view of it in a row, with captions, on white."""
    shown = {"original": image.convert("RGB")} | {name: degrade(image) for name, degrade in views.items()}
    out = Image.new("RGB", (len(shown) * (TILE + GAP) + GAP, TILE + GAP + CAPTION), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(size=15)
    for place, (name, picture) in enumerate(shown.items()):
        x = GAP + place * (TILE + GAP)
        out.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), (x, GAP))  # square tiles; pixels stay visible
        draw.text((x + TILE / 2, TILE + GAP + CAPTION / 2), name, fill="#1d2025", font=font, anchor="mm")
    return out


if __name__ == "__main__":
    figure = sample_figure(random.Random("views")).image
    strip(figure, {name: view(name) for name in VIEWS}).save(Path(sys.argv[1]), optimize=True)
