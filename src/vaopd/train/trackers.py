"""The run's rows in TensorBoard, Weights & Biases and trackio, through Accelerate's trackers.

`metrics.jsonl` and `samples.jsonl` are the record, a tracker is a mirror of them. Whenever a run starts or is resumed, its trackers forget
it and are told it again from the files, so that they have every row once, whatever a kill made of their own files, and one that was
added later has the whole run. Nothing leaves the machine unless the user sets WANDB_MODE=online.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from vaopd.config import RunConfig
from vaopd.errors import ConfigError
from vaopd.train.folder import RunFolder, read_rows

PROJECT = "vaopd"
SAMPLES = "eval/samples"
COLUMNS = ("id", "prompt", "answer", "response", "right", "mean VA", "mean KL", "weight", "tokens", "ended")
IDENTITY = "tracker.json"  # of the run folder: the name under which trackers know the run
MODES = ("offline", "online", "disabled")  # of W&B
TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def check(names: Sequence[str]) -> None:
    """Whether the recipe's trackers can work here. Raises ConfigError before anything is loaded."""
    for name in names:
        if not _installed(name):
            raise ConfigError(
                f"the recipe's trackers name {name}, which is not installed. Install it: pip install 'vaopd[trackers]', "
                "or take it out of `trackers`"
            )
    if "wandb" in names:
        wandb_mode()
    if "trackio" in names:
        _check_trackio()


def make(config: RunConfig) -> list[GeneralTracker]:
    """What `Accelerator(log_with=…)` takes; nothing is written before `tracked`."""
    return [TRACKERS[name](config) for name in config.trackers]


@contextmanager
def tracked(accelerator: Accelerator, folder: RunFolder) -> Iterator[list[str]]:
    """The trackers, told what the run folder has, as long as the run goes on; yields where to look at them, a line for each."""
    accelerator.init_trackers(PROJECT)  # before the `try`: of trackers that did not start, none can be ended
    try:
        if accelerator.trackers:  # there are none but on the main process
            _tell_all(accelerator, folder)
        yield [place for tracker in accelerator.trackers if (place := tracker.place())]
    finally:
        accelerator.end_training()


def _tell_all(accelerator: Accelerator, folder: RunFolder) -> None:
    """In the order of the steps, as W&B wants them: it takes nothing for a step once it has a later one."""
    samples: dict[int, list[dict[str, Any]]] = {}
    for sample in read_rows(folder.samples):
        samples.setdefault(sample["step"], []).append(sample)
    for row in read_rows(folder.metrics):
        log_metrics(accelerator, row)
        if row["kind"] == "eval":
            log_samples(accelerator, row["step"], samples.get(row["step"], []))


def log_metrics(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """A row of metrics.jsonl at its own step, as `train/loss`; on the main process, as Accelerate does. `null` is left out."""
    accelerator.log({f"{row['kind']}/{key}": value for key, value in row.items() if key != "step" and _number(value)}, step=row["step"])


def log_samples(accelerator: Accelerator, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """The rows of samples.jsonl of one evaluation as each tracker's own table, a row for each rollout."""
    table = sample_table(samples)
    for tracker in accelerator.trackers if table else ():
        tracker.log_table(SAMPLES, list(COLUMNS), table, step=step)


def sample_table(samples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """(rollouts, COLUMNS): texts as they are; VA and KL in nats per token, None where one of them is not finite."""
    return [
        [
            sample["id"],
            sample["problem"],
            sample["answer"],
            rollout["text"],
            rollout["correct"],
            _mean(rollout["va"]),
            _mean(rollout["kl"]),
            rollout["weight"] if _number(rollout["weight"]) else None,
            len(rollout["tokens"]),
            rollout["ended"],
        ]
        for sample in samples
        for rollout in sample["rollouts"]
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for TensorBoard, which renders Markdown and HTML: of a cell's text, nothing is either."""
    lines = [columns, ["---"] * len(columns), *([_plain_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class TensorBoard(TensorBoardTracker):
    """`tensorboard/` of the run folder."""

    def __init__(self, config: RunConfig) -> None:
        # purge_step tells a TensorBoard that is looking on to forget what it has read.
        super().__init__("tensorboard", config.run, purge_step=0)

    def start(self) -> None:
        """Forget the run, and open it."""
        for file in (Path(self.logging_dir_param) / self.run_name).glob("events.out.tfevents.*"):
            file.unlink()
        super().start()

    def log_table(self, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], *, step: int) -> None:
        """As a Markdown table among the texts."""
        self.log({name: markdown_table(columns, data)}, step=step)

    def place(self) -> str:
        """Nothing to say: it is where the run is."""
        return ""


class WandB(WandBTracker):
    """`wandb/` of the run folder; offline unless WANDB_MODE says otherwise. One id for the whole run, resumed or not."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(PROJECT)
        self.config = config

    def start(self) -> None:
        """Forget the run as far as it was written offline, and open it. Raises ConfigError where W&B can't be reached or entered."""
        mode, id_ = wandb_mode(), identity(self.config.run)
        if mode != "online":
            # Offline, too, W&B's package sends reports about itself as the process ends, unless it is told not to.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        for earlier in (self.config.run / "wandb").glob(f"offline-run-*-{id_}"):
            shutil.rmtree(earlier)
        import wandb

        try:
            self.run = wandb.init(
                project=PROJECT,
                name=self.config.run.absolute().name,
                id=id_,
                dir=str(self.config.run),
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="create_new",  # a run of the caller's own is not ended by this one
                config=self.config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases did not start with WANDB_MODE={mode}: {str(error).rstrip('.')}. "
                "Log in with `wandb login`, or unset WANDB_MODE to write offline and send later"
            ) from None

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """What an online run has already is not sent again: W&B takes no step below its last."""
        if step is None or step >= self.run.step:
            super().log(values, step=step, **options)

    def place(self) -> str:
        """How to send or open it."""
        if self.run.url:
            return f"W&B online: {self.run.url}"
        return f"W&B offline: send it with `wandb sync {Path(self.run.dir).parent}`" if wandb_mode() == "offline" else ""


class Trackio(TrackioTracker):
    """`trackio/` of the run folder, or the folder that TRACKIO_DIR names, for the runs of several folders on one page."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(PROJECT)
        self.config = config

    def start(self) -> None:
        """Forget the run, and open it. Raises ConfigError where this process has opened trackio in another folder."""
        trackio = _import_trackio(_trackio_dir(self.config.run))
        self.name_of_run = f"{self.config.run.absolute().name}-{identity(self.config.run)}"
        with _quiet_and_off_the_hub():
            trackio.fragments.import_inbox_dir()  # on a network file system rows wait in files first
            for earlier in _trackio_runs(trackio):
                if earlier.name == self.name_of_run:
                    earlier.delete()
            self.run = trackio.init(
                project=PROJECT,
                name=self.name_of_run,
                config=self.config.model_dump(mode="json"),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log_table(self, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], *, step: int) -> None:
        """As trackio's own table, whose cells are shown as plain text."""
        import trackio

        self.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in data])}, step=step)

    def finish(self) -> None:
        """Write what is still queued."""
        import trackio

        with _quiet_and_off_the_hub():
            trackio.finish()

    def place(self) -> str:
        """How to open it."""
        return f"trackio: look at it with `TRACKIO_DIR={_trackio_dir(self.config.run)} trackio show --project {PROJECT}`"


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def identity(run: Path) -> str:
    """Eight hex digits that stay with a run folder."""
    file = run / IDENTITY
    if file.exists():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    name = secrets.token_hex(4)
    RunFolder(run).write_json(IDENTITY, {"id": name})
    return name


def wandb_mode() -> str:
    """W&B's mode: WANDB_MODE, else offline, whatever W&B's own settings files say. Raises ConfigError."""
    given = os.environ.get("WANDB_MODE") or "offline"
    if given not in MODES:
        raise ConfigError(f"WANDB_MODE must be offline, online or disabled, found '{given}'. Unset it to write offline")
    return given


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name, as wandb makes one, looks like a package too


def _check_trackio() -> None:
    for variable in TRACKIO_ELSEWHERE:
        if os.environ.get(variable):
            raise ConfigError(
                f"{variable} would send the run away as it goes on, but vaopd writes trackio's rows on this machine only. "
                f"Unset it; a run that is done is published with `trackio sync --project {PROJECT}`"
            )


def _trackio_dir(run: Path) -> Path:
    given = os.environ.get("TRACKIO_DIR")
    return Path(given) if given else run / "trackio"


def _import_trackio(folder: Path) -> Any:
    """trackio reads its folder from the environment once, when it is first imported. Raises ConfigError."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder.absolute())
    try:
        import trackio
        from trackio import fragments, utils  # noqa: F401
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before
    if utils.TRACKIO_DIR.absolute() != folder.absolute():
        raise ConfigError(
            f"trackio keeps one folder for a whole process, here {utils.TRACKIO_DIR}, but this run's is {folder}. "
            "Start the run in a process of its own, or set TRACKIO_DIR before the first one to keep them all together"
        )
    return trackio


def _trackio_runs(trackio: Any) -> list[Any]:
    try:
        return list(trackio.Api().runs(PROJECT))
    except ValueError:  # nobody has logged here yet
        return []


@contextmanager
def _quiet_and_off_the_hub() -> Iterator[None]:
    """trackio prints into the progress bars, and asks the hub who the user is, with the user's token, as it opens a run."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing: a mean over the others would be another token's."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def _plain_text(cell: Any) -> str:
    """No character that Markdown or HTML could read: those are HTML entities, a line break is the one tag, controls are `\ufffd`."""
    if cell is None:
        return ""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return "<br>".join("".join(_character(c) for c in line) for line in text.split("\n"))


def _character(c: str) -> str:
    if c.isalnum() or c == " ":
        return c
    return f"&#{ord(c)};" if c.isprintable() else "\ufffd"
