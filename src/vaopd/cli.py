"""Every command. Nothing heavy is imported before a command knows that its recipe is right."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vaopd import terminal
from vaopd.config import MethodConfig, ViewConfig, load_config, load_study, load_world
from vaopd.errors import ConfigError, VaopdError, did_you_mean
from vaopd.views import VIEWS

app = typer.Typer(
    help="On-policy distillation of vision-language models with visual advantage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be repeated.")]
ViewName = Annotated[str, typer.Option("--view", help=f"How the image is degraded: {', '.join(VIEWS)}.")]
ViewOptions = Annotated[
    list[str] | None, typer.Option("--view-set", metavar="KEY=VALUE", help="An option of the view, as in ratio=0.2; may be repeated.")
]
SamplingNoise = Annotated[int, typer.Option(help="Of the sampling noise.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest response.")]
Temperature = Annotated[float, typer.Option(min=0.01, help="Of sampling.")]
SideBySide = Annotated[int, typer.Option(min=1, help="Responses decoded side by side.")]
JsonFile = Annotated[Path | None, typer.Option(help="Write the result as JSON.")]


def main() -> None:
    """Entry point: a user's mistake is one message and a non-zero exit, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except VaopdError as error:
        terminal.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal.error("interrupted; go on with --resume")
        sys.exit(130)


def _terminated(number: int, frame: object) -> NoReturn:
    """Let what is being done be undone: a study ends its processes. A run goes on from its last checkpoint."""
    sys.exit(128 + number)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, or the name of a shipped one.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
) -> None:
    """Train a student; writes one run folder."""
    config = load_config(_shipped(recipe), overrides or [])
    from accelerate import PartialState

    from vaopd.train.loop import train as run

    _quiet()
    with terminal.TrainingView(config) as view:
        folder = run(config, resume=resume, progress=view.progress())
    if not PartialState().is_main_process:  # of several, one has written the folder
        return
    terminal.show_run(folder)
    if report:
        _write_report([folder], None)


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, or the name of a shipped one.")],
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="Plan for this GPU, as in 'RTX 4090' or H100; default: what is here.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs that share a step's prompts.")] = 1,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Look at every row and picture.")] = True,
) -> None:
    """Check data, models, their agreement, memory and time of a recipe before anything is trained; no weight is loaded."""
    config = load_config(_shipped(recipe), overrides or [])
    from vaopd.preflight.check import validate as check
    from vaopd.preflight.cost import device_named, this_device

    _quiet()
    planned = device_named(device) if device else this_device()
    with terminal.looking() as on_progress:
        verdict = check(config, planned, processes=processes, with_data=data, on_progress=on_progress)
    for text in verdict.checks:
        terminal.say(f"checks     {text}")
    for problem in verdict.problems:
        terminal.error(problem)
    if verdict.problems:
        raise typer.Exit(1)
    terminal.say("nothing stands against this run")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub name or builtin:NAME.")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet with questions, answers and images.")],
    k: Annotated[int, typer.Option(min=1, help="Samples per question.")] = 8,
    teacher: Annotated[str | None, typer.Option(help="Scores how much the answers depend on the image.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    rows: SideBySide = 64,
    view: ViewName = "pixelate",
    view_set: ViewOptions = None,
    seed: SamplingNoise = 1,
    out: JsonFile = None,
) -> None:
    """Measure avg@k with its standard error, and blind accuracy beside it."""
    view_config = ViewConfig.from_options(view, view_set or [])
    from vaopd.evaluate.command import evaluate_folder

    _quiet()
    with terminal.counting("evaluating") as on_progress:
        result = evaluate_folder(
            model,
            data,
            k=k,
            teacher=teacher,
            max_tokens=max_tokens,
            temperature=temperature,
            rows=rows,
            view_config=view_config,
            seed=seed,
            on_progress=on_progress,
        )
    terminal.show_models({model: result}, questions=result["questions"], k=k)
    _write_json(result, out)


@app.command("lmms-eval")
def lmms_eval(
    model: Annotated[str, typer.Argument(help="Folder, hub name or builtin:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the result and of every sample; samples that are there aren't run again.")],
    tasks: Annotated[str, typer.Option(help="By commas; default: the paper's eight. TASK=METRIC for another of lmms-eval.")] = "",
    k: Annotated[int, typer.Option(min=1, help="Samples per question.")] = 8,
    max_tokens: MaxTokens = 4096,
    temperature: Temperature = 1.0,
    rows: SideBySide = 64,
    seed: SamplingNoise = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="The first questions of each alone, to try a set-up.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint, as in http://127.0.0.1:8000/v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model that judges.")] = None,
    judge_key_env: Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the endpoint's key.")] = "VAOPD_JUDGE_KEY",
    lmms_python: Annotated[
        Path | None, typer.Option(help="Python of the environment with lmms-eval; default: the environment variable VAOPD_LMMS_PYTHON.")
    ] = None,
    backend: Annotated[str, typer.Option(help="vaopd, or one of lmms-eval's models.")] = "vaopd",
    model_args: Annotated[str, typer.Option(help="More for the backend, as in tensor_parallel_size=2.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
) -> None:
    """Measure avg@k on published benchmarks, through lmms-eval in an environment of its own (docs/benchmarks.md)."""
    from vaopd.evaluate.lmms import RESULT, evaluate_benchmarks
    from vaopd.evaluate.lmms_judge import Judge

    judge = Judge.from_options(judge_url, judge_model, judge_key_env)
    with terminal.sampling() as on_progress:
        result = evaluate_benchmarks(
            model,
            [name for name in (part.strip() for part in tasks.split(",")) if name],
            out,
            python=str(lmms_python) if lmms_python else None,
            k=k,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            rows=rows,
            limit=limit,
            judge=judge,
            backend=backend,
            model_args=model_args,
            include=include_path,
            say=terminal.say,
            on_progress=on_progress,
        )
    terminal.show_benchmarks(result)
    terminal.say(f"result: {out / RESULT}")


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Folder, run folder, hub name or builtin:NAME.")],
    teacher: Annotated[str, typer.Option(help="Scores the model's responses.")],
    data: Annotated[Path, typer.Option(help="JSONL or Parquet with questions and images.")],
    other: Annotated[list[str] | None, typer.Option(help="One more model that reads the same responses; may be repeated.")] = None,
    views: Annotated[list[str] | None, typer.Option(help="A view to compare, or all; may be repeated.")] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Also what each weighting's gradient is made of; takes minutes.")] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="YAML", help="One more weighting for --gradients: '{va_opd: {tau: 2}}'; may be repeated."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Samples per question.")] = 4,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    rows: SideBySide = 64,
    view: ViewName = "pixelate",
    view_set: ViewOptions = None,
    seed: SamplingNoise = 1,
    out: JsonFile = None,
) -> None:
    """Measure where advantage and divergence sit in a model's answers, and what depends on the image (docs/probes.md)."""
    view_config = ViewConfig.from_options(view, view_set or [])
    methods = [MethodConfig.from_option(text, "--method") for text in method or []]
    from vaopd.analysis.gradients import weightings_of
    from vaopd.analysis.probe_models import probe_folder
    from vaopd.rollouts.hf import Sampling

    _quiet()
    sampling = Sampling(max_tokens, temperature, 1.0, seed)
    weightings = weightings_of(methods) if gradients or methods else None
    with terminal.counting("probing") as on_progress:
        result = probe_folder(
            model,
            data,
            teacher=teacher,
            others=other or [],
            views=views or [],
            weightings=weightings,
            view_config=view_config,
            sampling=sampling,
            k=k,
            rows=rows,
            on_progress=on_progress,
        )
    terminal.show_probe(result)
    _write_json(result, out)


@app.command()
def inspect(
    teacher: Annotated[str, typer.Option(help="Scores the answer: folder, hub name or builtin:NAME.")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be repeated.")],
    question: Annotated[str, typer.Option(help="<image> marks where a picture goes; without marks they come first.")],
    student: Annotated[str | None, typer.Option(help="Answers; default: the teacher itself.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    view: ViewName = "pixelate",
    view_set: ViewOptions = None,
    seed: SamplingNoise = 1,
    out: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
) -> None:
    """Show which tokens of an answer depend on the image."""
    view_config = ViewConfig.from_options(view, view_set or [])
    from vaopd.analysis.inspection import inspect_answer
    from vaopd.rollouts.hf import Sampling

    _quiet()
    sampling = Sampling(max_tokens, temperature, 1.0, seed)
    found = inspect_answer(question, image, teacher=teacher, student=student, view_config=view_config, sampling=sampling)
    terminal.show_answer(found.sample)
    if out:
        from vaopd.report.answer_page import write_answer

        terminal.say(f"page: {write_answer(found.sample, found.pictures, out)}")


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="YAML study, or the name of a shipped one: demo, study_quick, study_main.")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the cells and how long they take, and stop.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes side by side; default: one per core.")] = None,
) -> None:
    """Run methods, students, teachers, data sizes, regimes and seeds side by side, compare them, and write one page (docs/own_study.md)."""
    config = load_study(_shipped(recipe), overrides or [])
    from vaopd.analysis.study import cores, foresee, run_study

    if plan or config.is_matrix:
        terminal.show_plan(config, foresee(config), workers or cores())
    if plan:
        return
    with terminal.StudyView(config) as view:
        summary = run_study(config, on_progress=view.update, workers=workers)
    terminal.show_study(summary)
    _write_report([config.run], None)


@app.command(hidden=True)
def cell(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of the cell.")],
    responses: Annotated[Path, typer.Option(help="The fixed responses.")],
    baseline: Annotated[str | None, typer.Option(help="student or teacher: evaluate it instead of training.")] = None,
    out: JsonFile = None,
    numbers_only: Annotated[bool, typer.Option("--numbers-only", help="Delete model and checkpoints at the end.")] = False,
) -> None:
    """One process of a study."""
    config = load_config(recipe)
    from vaopd.analysis.cell import run_baseline, run_cell

    _quiet()
    if baseline and out:
        run_baseline(config, baseline, responses, out)
    else:
        run_cell(config, responses, keep_model=not numbers_only, on_check=lambda text: terminal.say(f"checks     {text}"))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run or study folder, or several runs to put side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the folder, comparison.html beside several.")] = None,
) -> None:
    """Write the HTML page of a run, a study, or several runs side by side."""
    _write_report(runs, out)


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(help="Where train.parquet, eval.parquet and test.parquet go.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KNOB=VALUE", help="Turn a knob of docs/world.md; may be repeated.")
    ] = None,
) -> None:
    """Draw questions of the built-in world, in Geometry3K's schema."""
    config = load_world(overrides or [])
    from vaopd.world.data import export_world

    for path in export_world(config, folder):
        terminal.say(str(path))


@app.command()
def bench(
    p: Annotated[int | None, typer.Option("--p", help="Prompt tokens, image tokens included.")] = None,
    t: Annotated[int | None, typer.Option("--t", help="Response tokens.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Siblings per prompt.")] = None,
    v: Annotated[int | None, typer.Option("--v", help="Vocabulary of the models and of the loss.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which the variants take turns.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the ratios as JSON.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write hardware, versions and every round as JSON.")] = None,
) -> None:
    """Measure what a step, a loss, a rollout and a whole training step cost, as ratios of one run."""
    _quiet()
    from vaopd.bench.command import bench as run

    run(p=p, t=t, k=k, v=v, rounds=rounds, json_file=json_file, details=details, console=terminal.console)


def _write_json(result: Mapping[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _write_report(runs: list[Path], out: Path | None) -> None:
    from vaopd.report import write_report

    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"there is no run folder at {run.absolute()}. Give the folder that `vaopd train` wrote")
    if len(runs) > 1 and out is None:
        out = runs[0].parent / "comparison.html"
    terminal.say(f"report: {write_report(runs if len(runs) > 1 else runs[0], out)}")


def _shipped(recipe: Path) -> Path:
    """A path as it is; a bare name is one of the recipes that the package ships."""
    if recipe.suffix or recipe.exists() or len(recipe.parts) > 1:
        return recipe
    folder = Path(str(files("vaopd") / "recipes"))
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if recipe.name not in known:
        raise ConfigError(f"no recipe '{recipe}'.{did_you_mean(recipe.name, known)} Shipped: {', '.join(known)}. Or give a YAML file")
    return folder / f"{recipe.name}.yaml"


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
