"""What a model of the built-in world gets wrong: reading the labels, or what it does with the labels it read."""

from __future__ import annotations

import re
from typing import Any

import torch

from vaopd.config import WorldConfig
from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.evaluate.grade import final_answer
from vaopd.evaluate.held_out import decoder, sampler
from vaopd.evaluate.runner import answer, standard_error
from vaopd.models.load import load_model, open_source
from vaopd.rollouts.hf import Sampling
from vaopd.types import Example
from vaopd.world.questions import DEFAULT, Figure, figures, work


def dissect_model(
    name: str, *, world: WorldConfig = DEFAULT, questions: int, k: int, max_tokens: int = 64, rows: int = 128
) -> dict[str, Any]:
    """Ask a model questions of the world at temperature 1 and take its answers apart.

    Returns:
        `parameters`; `accuracy` with `se` over questions; `digits`, the share of labels read right; `follows`, the share of answers
        that follow from the labels as they were read. Shares in [0, 1].
    """
    source = open_source(name)
    model = load_model(source, dtype=torch.float32)
    asked = list(figures(world, "dissect", questions))
    renderer = Renderer(source.processor)
    prompts = [renderer(Example(str(i), (png_bytes(f.image),), f.problem)) for i, f in enumerate(asked)]
    engine = sampler(model, source, Sampling(max_tokens), rows=rows)
    answers = answer(engine, prompts, [f.answer for f in asked], decoder(source), k=k)
    parts = [dissect(text, figure) for figure, texts in zip(asked, answers.texts, strict=True) for text in texts]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": float(answers.accuracy_Q.mean()),
        "se": standard_error(answers.accuracy_Q),
        "digits": sum(digits for digits, _ in parts) / len(parts),
        "follows": sum(follows for _, follows in parts) / len(parts),
    }


def dissect(text: str, figure: Figure) -> tuple[float, bool]:
    """(share of the labels that the response read right, whether its answer follows from the labels as it read them).

    A figure without a unit in its problem is meant: the labels are the first numbers of a response.
    """
    read = [int(number) for number in re.findall(r"\d+", text)][: len(figure.labels)]
    right = sum(mine == label for mine, label in zip(read, figure.labels, strict=False))
    return right / len(figure.labels), len(read) == len(figure.labels) and final_answer(text) == str(work(figure.kind, read)[1])
