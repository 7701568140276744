"""`vaopd validate`: data, models, their agreement, memory and time of a recipe, before any weight is loaded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vaopd.config import RunConfig
from vaopd.data.render import Renderer
from vaopd.data.survey import OnProgress, RowCheck, Survey, survey, unheard
from vaopd.data.validate import DataSets, arrange, files_of
from vaopd.errors import VaopdError
from vaopd.models.load import Source
from vaopd.preflight.cost import ARITHMETIC, BANDWIDTH, Cost, Device, evaluation_seconds, step_cost
from vaopd.preflight.memory import Memory, Work, estimate, measure
from vaopd.train.schedule import total_steps
from vaopd.train.setup import check_solutions, open_models, row_check
from vaopd.types import ORIGINAL

RENDERED = 32  # rows, spread over the set, that tell how long prompts are
ASSUMED = Work(prompt=600, response=0, patches=2000)  # without data: a picture of 500 image tokens and a question


@dataclass
class Verdict:
    """What was found. `problems` are those that would stop the run, or let it fail later."""

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, act: Callable[[], Any]) -> Any:
        """What `act` returns; None when it finds a user's mistake, which is kept."""
        try:
            return act()
        except VaopdError as error:
            self.problems.append(str(error))
            return None


def validate(
    recipe: RunConfig,
    device: Device,
    *,
    processes: int = 1,
    with_data: bool = True,
    on_progress: Callable[[str], OnProgress] = lambda name: unheard,
) -> Verdict:
    """Every gate of a run, each on its own, so that one mistake doesn't hide the next. Nothing is written, no weight is loaded."""
    verdict = Verdict()
    sources = verdict.attempt(lambda: open_models(recipe, verdict.checks.append))
    check = verdict.attempt(lambda: _row_check(recipe, sources)) if sources else None
    sets = _data(recipe, verdict, check, on_progress) if with_data else None
    if sources:
        source, teacher = sources
        lengths = verdict.attempt(lambda: prompt_lengths(recipe, source, sets)) if sets and check else None
        typical, longest = lengths or (ASSUMED, ASSUMED)
        _plan(verdict, recipe, source, teacher, (typical, longest), device, sets, processes)
    return verdict


def _row_check(recipe: RunConfig, sources: tuple[Source, Source | None]) -> RowCheck:
    return row_check(recipe, sources, Renderer(sources[0].processor))


def _data(recipe: RunConfig, verdict: Verdict, check: RowCheck | None, on_progress: Callable[[str], OnProgress]) -> DataSets | None:
    """Every file on its own, then what they are to one another."""
    data, found = recipe.data, dict[str, Survey]()
    began = time.perf_counter()
    for name, path in files_of(data).items():
        seen = verdict.attempt(lambda: survey(path, data.format, data.question, strict=False, check=check, on_progress=on_progress(name)))  # noqa: B023 - called at once
        if seen:
            found[name] = seen
    seconds = max(time.perf_counter() - began, 1e-9)
    pictures = sum(each.pictures for each in found.values())
    verdict.checks.append(f"{pictures} images decoded in {seconds:.1f} s, {pictures / seconds:.0f} a second")
    for name, each in found.items():
        if len(each.defects) and (data.bad_rows == "refuse" or not each.digests):
            verdict.problems.append(defects_text(name, each))
    if found.keys() != files_of(data).keys() or not all(each.digests for each in found.values()):
        return None
    sets: DataSets | None = verdict.attempt(lambda: arrange(data, found))
    if sets:
        verdict.checks += sets.notes
        verdict.attempt(lambda: check_solutions(recipe, sets))
    return sets


def defects_text(name: str, found: Survey) -> str:
    """How many rows are bad, by reason, and the first of them."""
    good, bad = len(found.digests), len(found.defects)
    rest = ", or leave them out with data.bad_rows: skip" if good else ""
    lines = [f"data.{name}: {bad} of {good + bad} rows can't be used. Mend them{rest}"]
    lines += [f"  {count:>6} x {reason}" for reason, count in found.defects.by_reason.most_common()]
    lines += [f"  - {error}" for error in found.defects.first]
    return "\n".join(lines)


def prompt_lengths(recipe: RunConfig, source: Source, sets: DataSets) -> tuple[Work, Work]:
    """(typical, longest) prompt of the training file, with the longest answer that the recipe allows.

    Tokens are known of every row; patches of the longest and of up to 32 others. Raises DataError for a row that can't be rendered.
    """
    renderer, found = Renderer(source.processor), sets.surveys["train"]
    rows, tokens = found.rows, np.array(found.tokens)
    spread = range(0, len(rows), -(-len(rows) // RENDERED))
    patches = [_patches(renderer(rows[index], (ORIGINAL,)).images.get(ORIGINAL, {})) for index in [int(tokens.argmax()), *spread]]
    return (
        Work(round(tokens.mean()), recipe.rollouts.max_tokens, round(statistics.mean(patches[1:]))),
        Work(int(tokens.max()), recipe.rollouts.max_tokens, max(patches)),
    )


def _patches(tensors: Any) -> int:
    grid = tensors.get("image_grid_thw")
    if grid is not None:
        return int(grid.prod(-1).sum())
    pixels = tensors.get("pixel_values")
    return 0 if pixels is None else int(pixels.shape[0] * pixels.shape[-1] * pixels.shape[-2] // 14**2)


def _plan(
    verdict: Verdict,
    recipe: RunConfig,
    source: Source,
    teacher_source: Source | None,
    lengths: tuple[Work, Work],
    device: Device,
    sets: DataSets | None,
    processes: int,
) -> None:
    """Memory and time, from the configurations."""
    typical, longest = (Work(work.prompt, recipe.rollouts.max_tokens, work.patches) for work in lengths)
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest.prompt + longest.response > limit:
        verdict.problems.append(
            f"the longest prompt found has {longest.prompt} tokens, and with rollouts.max_tokens {longest.response} that is more than the "
            f"{limit} that {source.name} was made for. Lower data.max_pixels or rollouts.max_tokens"
        )
    student, teacher = measure(source.config, recipe), measure(teacher_source.config) if teacher_source else None
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.gpu)
    memory = estimate(recipe, student, teacher, longest, gpu=device.gpu, bf16=bf16, processes=processes)
    verdict.checks.append(memory_text(memory, device))
    if memory.peak > device.memory:
        verdict.problems.append(
            f"about {gib(memory.peak)} GiB are needed at once, but {device.name} has {gib(device.memory)}. In order of what they cost: "
            "optim.checkpointing: true; a smaller optim.tokens_per_forward; teacher_offload: true; lora: {}"
        )
    steps = recipe.optim.steps or (total_steps(recipe.optim, len(sets.train)) if sets else None)
    evaluations = None
    if sets and steps:
        evaluations = evaluation_seconds(recipe, student, teacher, device, steps=steps, held_out=len(sets.held_out), test=len(sets.test))
    cost = step_cost(recipe, student, teacher, typical, device, processes=processes)
    verdict.checks.append(cost_text(cost, steps, device, evaluations))


def memory_text(memory: Memory, device: Device) -> str:
    """The peak and what it consists of."""
    parts = ", ".join(f"{name} {gib(size)}" for name, size in memory.phases[memory.phase].items() if size > memory.peak // 100)
    return f"memory at most about {gib(memory.peak)} GiB of {gib(device.memory)} on {device.name}, in {memory.phase}: {parts}"


def cost_text(cost: Cost, steps: int | None, device: Device, evaluations: float | None = None) -> str:
    """Arithmetic of a step, and hours where the device's figures are known. `evaluations`: their seconds."""
    text = f"a step is {cost.flops / 1e12:,.1f} TFLOP where every answer takes rollouts.max_tokens"
    if steps is not None:
        text += f", {steps} steps"
    if cost.seconds is None:
        return text
    text += f"; {cost.seconds:.0f} s" + (f", {cost.seconds * steps / 3600:.1f} h in all" if steps is not None else "")
    text += ", evaluations apart" if evaluations is None else f", and {evaluations / 3600:.1f} h for evaluations"
    return f"{text} (at {100 * ARITHMETIC:.0f} % of {device.name}'s arithmetic and {100 * BANDWIDTH:.0f} % of its bandwidth)"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f}" if size < 2**40 else f"{size / 2**30:,.0f}"
