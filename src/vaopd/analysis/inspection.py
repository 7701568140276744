"""`vaopd inspect`: one question about one's own pictures, and which tokens of an answer depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vaopd.analysis.probe_models import load
from vaopd.config import ViewConfig
from vaopd.core import VAOPD
from vaopd.data.images import decode
from vaopd.data.render import Renderer
from vaopd.data.sources import IMAGE_MARK
from vaopd.errors import DataError
from vaopd.evaluate.command import DEADBAND, TOKENS_PER_FORWARD
from vaopd.evaluate.held_out import decoder, sampler
from vaopd.rollouts.hf import Sampling
from vaopd.train.samples import score_groups, token_pieces
from vaopd.types import Example


@dataclass(frozen=True)
class Inspection:
    """An answer with its scores, and the pictures that it is about."""

    sample: dict[str, Any]  # a row of samples.jsonl (docs/run_folder.md) with one rollout, and `student`, `teacher`: their names
    pictures: list[tuple[Image.Image, Image.Image]]  # each image, and its degraded view


def inspect_answer(
    question: str, images: Sequence[Path], *, teacher: str, student: str | None, view_config: ViewConfig, sampling: Sampling
) -> Inspection:
    """Sample one answer and score it under both views.

    Args:
        question: `<image>` marks where each picture goes; without marks they come first.
        teacher: the model that scores.
        student: the model that answers; None: the teacher itself, and no divergence is reported.

    Raises:
        DataError: a picture or the question can't be used.
        ModelError: a model can't be loaded, or the two don't agree.
    """
    if not images:
        raise DataError("an answer can depend on an image only where there is one. Give --image FILE")
    if not question.replace(IMAGE_MARK, "").strip():
        raise DataError("the question is empty. Give --question TEXT")
    example = Example("the question", tuple(images), question)
    originals = [decode(path) for path in images]
    answering, scoring = load([student or teacher, teacher])
    renderer = Renderer(answering.source.processor, view_config.make())
    [group] = sampler(answering.model, answering.source, sampling).generate([renderer(example)], 1, 0)
    scored = score_groups(
        answering.model,
        scoring.scorer,
        [group],
        vocab_size=answering.source.vocab_size,
        forward=answering.scorer.forward,
        tokens_per_forward=TOKENS_PER_FORWARD,
        weighting=VAOPD(),
        deadband=DEADBAND,
        divergence="reverse_kl",
    )
    columns: dict[str, Any] = dict(scored.groups[0][0])
    if student is None:
        del columns["kl"], columns["logp_student"]
    text, tokens = decoder(answering.source)(group.responses[0]), token_pieces(answering.source.processor.tokenizer)(group.responses[0])
    rollout = {"text": text, "ended": group.ended_K[0], "tokens": tokens, **columns}
    sample = {"problem": question, "student": student or teacher, "teacher": teacher, "rollouts": [rollout]}
    return Inspection(sample, list(zip(originals, renderer.degraded_images(example), strict=True)))
