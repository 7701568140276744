"""What `vaopd evaluate` does: a model folder and a data set in, one entry of eval.json out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vaopd.config import ViewConfig
from vaopd.data.render import Renderer
from vaopd.data.sources import read_examples
from vaopd.evaluate.held_out import evaluate_model
from vaopd.models.load import check_agreement, load_model, open_source, show_alike
from vaopd.models.shared_prompt import Auto
from vaopd.rollouts.hf import Sampling
from vaopd.teachers.local import LocalTeacher

DEADBAND = 1e-4  # nats; the default of a recipe
TOKENS_PER_FORWARD = 16384


def evaluate_folder(
    model: str,
    data: Path,
    *,
    k: int,
    teacher: str | None,
    max_tokens: int,
    temperature: float,
    rows: int,
    view_config: ViewConfig,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Evaluate a model on all rows of a data set; returns its entry of `eval.json` with `questions` and `k`.

    Raises:
        ModelError, DataError, ConfigError: something can't be loaded, or model and teacher don't agree.
    """
    source = open_source(model)
    if teacher:
        teacher_source = open_source(teacher)
        show_alike(source, teacher_source)
        check_agreement(source, teacher_source)
    examples = read_examples(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_model(source, dtype=dtype).to(device)
    scorer = None
    if teacher:
        scoring = loaded if teacher == model else load_model(teacher_source, dtype=dtype).to(device)
        scorer = LocalTeacher(scoring, vocab_size=source.vocab_size, forward=Auto(), tokens_per_forward=TOKENS_PER_FORWARD)
    entry = evaluate_model(
        loaded,
        source,
        examples,
        Renderer(source.processor, view_config.make()),
        Sampling(max_tokens, temperature, 1.0, seed, bf16=device.type == "cuda"),
        k=k,
        teacher=scorer,
        deadband=DEADBAND,
        rows=rows,
        on_progress=on_progress,
    )
    return {"questions": len(examples), "k": k, **entry}
