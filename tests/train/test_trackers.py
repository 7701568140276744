"""What a run's trackers have is what its files have: every number, at its own step, once, however often the run was killed.

The real packages write, and what they wrote is read back. `make test-trackers` installs Weights & Biases and trackio.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugin_util import markdown_to_safe_html

from small_pair import Pair, make_config
from vaopd.config import RunConfig
from vaopd.data.sources import read_examples, write_examples
from vaopd.errors import ConfigError
from vaopd.train import trackers
from vaopd.train.folder import read_rows
from vaopd.train.loop import Progress, train
from vaopd.train.setup import set_up

RUN = {"optim": {"lr": 1e-3, "prompts_per_step": 2, "steps": 3, "warmup": 0.25}, "checkpoint": {"every": 1}}
PEERS = [name for name in ("wandb", "trackio") if trackers._installed(name)]
needs_wandb = pytest.mark.skipif("wandb" not in PEERS, reason="W&B is not installed")
needs_trackio = pytest.mark.skipif("trackio" not in PEERS, reason="trackio is not installed")
EVERY = [
    "tensorboard",
    pytest.param("wandb", marks=needs_wandb),
    pytest.param("trackio", marks=needs_trackio),
]
HOSTILE = "<img src=x onerror=alert(1)> | **bold** [a](javascript:alert(1)) ![p](http://192.0.2.1/p)\n| - |\n# <script>alert(2)</script>"

Numbers = list[tuple[str, int, float]]  # key, step, value, in the order in which they were written
Tables = dict[int, list[list[Any]]]  # step -> rows


@pytest.fixture(scope="session")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, trackio_dir: Path) -> None:
    """trackio has one folder for this whole process; nothing of the machine's own settings is read."""
    for variable in ("WANDB_MODE", "WANDB_ERROR_REPORTING", *trackers.TRACKIO_ELSEWHERE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_dir))


# --- what was written -------------------------------------------------------------------------------------------------


def written(run: Path, name: str) -> tuple[Numbers, Tables]:
    """All that a tracker has of a run."""
    readers = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
    return readers[name](run)


def read_tensorboard(run: Path) -> tuple[Numbers, Tables]:
    """Event by event, so that nothing is purged or merged."""
    numbers, tables = [], {}
    for file in sorted((run / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    (text,) = value.tensor.string_val
                    tables[event.step] = markdown_rows(text.decode())
                else:
                    (number,) = value.tensor.float_val
                    numbers.append((value.tag, event.step, number))
    return numbers, tables


def markdown_rows(text: str) -> list[list[Any]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    assert lines[0] == list(trackers.COLUMNS)
    return [[html.unescape(cell.replace("<br>", "\n")) for cell in line] for line in lines[2:]]


def read_wandb(run: Path) -> tuple[Numbers, Tables]:
    """The history of the one offline run, with the tables that it names."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    numbers, tables = [], {}
    for record in wait_for_the_end(file):
        items = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in record.history.item}
        for keys, value in items.items():
            if keys == (trackers.SAMPLES, "path"):
                table = json.loads((folder / "files" / value).read_text(encoding="utf-8"))
                assert table["columns"] == list(trackers.COLUMNS)
                tables[items["_step",]] = table["data"]
            elif keys[0] != trackers.SAMPLES and not keys[0].startswith("_"):
                numbers.append(("/".join(keys), items["_step",], value))
    return numbers, tables


def wait_for_the_end(file: Path) -> list[Any]:
    """W&B writes in a process of its own, which ends a moment after `finish`: with a record that says so."""
    for _ in range(200):
        records = list(wandb_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def wandb_records(file: Path) -> Iterator[Any]:
    """LevelDB's log format, which W&B writes: blocks of 32 KiB of fragments, each after its checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_trackio(run: Path) -> tuple[Numbers, Tables]:
    """The run's rows in trackio's data base."""
    folder = Path(os.environ.get("TRACKIO_DIR", run / "trackio"))
    numbers, tables = [], {}
    data_base = sqlite3.connect(folder / "vaopd.db")
    query = "SELECT run_id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id"
    rows = data_base.execute(query, (f"{run.name}-{trackers.identity(run)}",)).fetchall()
    data_base.close()
    assert len({run_id for run_id, _, _ in rows}) == 1
    for _, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            if isinstance(value, dict):
                assert (key, value["_type"]) == (trackers.SAMPLES, "trackio.table")
                assert {tuple(row) for row in value["_value"]} == {trackers.COLUMNS}
                tables[step] = [list(row.values()) for row in value["_value"]]
            else:
                numbers.append((key, step, value))
    return numbers, tables


# --- what should have been --------------------------------------------------------------------------------------------


def recorded(run: Path) -> Numbers:
    return [
        (f"{row['kind']}/{key}", row["step"], value)
        for row in read_rows(run / "metrics.jsonl")
        for key, value in row.items()
        if key not in ("kind", "step") and value is not None
    ]


def assert_mirrors(run: Path, name: str, steps: tuple[int, ...] = (0, 2, 3)) -> None:
    """Every number of metrics.jsonl at its step, once, and a table for every evaluation with a row for every rollout."""
    numbers, tables = written(run, name)
    expected = recorded(run)
    assert len(expected) > 40
    assert sorted((key, step) for key, step, _ in numbers) == sorted((key, step) for key, step, _ in expected)
    exact = {(key, step): value for key, step, value in expected}
    for key, step, value in numbers:
        # TensorBoard keeps single precision.
        assert value == (pytest.approx(exact[key, step], rel=1e-6) if name == "tensorboard" else exact[key, step]), (key, step)
    assert tuple(tables) == steps
    for step in steps:
        samples = [row for row in read_rows(run / "samples.jsonl") if row["step"] == step]
        rollouts = [(sample, rollout) for sample in samples for rollout in sample["rollouts"]]
        assert len(rollouts) == len(tables[step]) == 4
        for (sample, rollout), cells in zip(rollouts, tables[step], strict=True):
            va, kl = (math.fsum(rollout[key]) / len(rollout[key]) for key in ("va", "kl"))
            row = [sample["id"], sample["problem"], sample["answer"], rollout["text"], rollout["correct"]]
            row += [va, kl, rollout["weight"], len(rollout["tokens"]), rollout["ended"]]
            if name == "tensorboard":
                assert cells == [shown(cell) for cell in row]
            else:
                assert cells == pytest.approx(row, abs=1e-12)


def shown(cell: Any) -> str:
    """What TensorBoard has of a cell: numbers are rounded, controls are not characters of HTML."""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


# --- a run and its mirrors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, pair: Pair, data: dict[str, str], trackio_dir: Path) -> Path:
    """One uninterrupted run with every tracker that is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(trackio_dir))
        patch.delenv("WANDB_MODE", raising=False)
        config = make_config(tmp_path_factory.mktemp("straight") / "run", pair, data, **RUN, trackers=["tensorboard", *PEERS])
        return train(config)


@pytest.mark.parametrize("name", EVERY)
def test_a_tracker_has_every_number_and_every_table(straight: Path, name: str) -> None:
    assert_mirrors(straight, name)


class Killed(BaseException):
    """A kill: no handler of ordinary errors sees it."""


def die_at(kind: str, step: int) -> Progress:
    def on_row(row: dict[str, Any], steps: int) -> None:
        if (row["kind"], row["step"]) == (kind, step):
            raise Killed

    return Progress(on_row=on_row)


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_goes_on_without_a_repeated_or_a_missing_step(recipe: Callable[..., RunConfig], name: str) -> None:
    """The rows of step 2 are written twice by the run, which has no checkpoint of it yet when it dies."""
    config = recipe(**RUN, trackers=[name])
    with pytest.raises(Killed):
        train(config, progress=die_at("eval", 0))
    identity = trackers.identity(config.run)
    if name == "wandb":
        written(config.run, name)  # which waits for its process
    with pytest.raises(Killed):
        train(config, resume=True, progress=die_at("eval", 2))
    before, _ = written(config.run, name)
    assert ("train/loss", 2) in {(key, step) for key, step, _ in before}
    train(config, resume=True)
    assert trackers.identity(config.run) == identity
    assert_mirrors(config.run, name)


@pytest.mark.parametrize("name", EVERY)
def test_a_tracker_that_is_added_later_has_the_whole_run(recipe: Callable[..., RunConfig], name: str) -> None:
    with pytest.raises(Killed):
        train(recipe(**RUN), progress=die_at("train", 3))
    train(recipe(**RUN, trackers=[name]), resume=True)
    assert_mirrors(recipe().run, name)


@pytest.mark.parametrize("fault", ["step", "value", "missing", "repeated", "table"])
def test_a_planted_mistake_is_caught(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    log_metrics, log_samples = trackers.log_metrics, trackers.log_samples

    def wrong(accelerator: Any, row: dict[str, Any]) -> None:
        if fault == "step":
            row = {**row, "step": row["step"] + 1}
        elif fault == "value" and row["kind"] == "eval":
            row = {**row, "kl": -row["kl"]}
        if fault != "missing" or row["step"] != 2:
            log_metrics(accelerator, row)
        if fault == "repeated" and row["step"] == 2:
            log_metrics(accelerator, row)

    monkeypatch.setattr(trackers, "log_metrics", wrong)
    if fault == "table":
        monkeypatch.setattr(trackers, "log_samples", lambda accelerator, step, samples: log_samples(accelerator, step, samples[1:]))
    run = train(recipe(**RUN, trackers=["tensorboard"]))
    with pytest.raises(AssertionError):
        assert_mirrors(run, "tensorboard")


def test_tensorboard_shows_what_it_read(straight: Path) -> None:
    """Through TensorBoard's own reader, which merges files and purges what was overwritten."""
    reader = EventAccumulator(str(straight / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in reader.Tensors(f"{trackers.SAMPLES}/text_summary")] == [0, 2, 3]


def test_only_the_main_process_logs(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, straight: Path) -> None:
    config = recipe(**RUN, trackers=["tensorboard", *PEERS])
    run = set_up(config, on_check=lambda text: None)
    run.folder.start(config.to_yaml())
    second_of_two = {"process_index": 1, "num_processes": 2, "distributed_type": DistributedType.MULTI_CPU}
    for key, value in second_of_two.items():
        monkeypatch.setitem(PartialState._shared_state, key, value)
    with trackers.tracked(run.tools.accelerator, run.folder) as places:
        trackers.log_metrics(run.tools.accelerator, {"kind": "train", "step": 1, "loss": 1.0})
        trackers.log_samples(run.tools.accelerator, 1, read_rows(straight / "samples.jsonl"))
    assert places == []
    assert {path.name for path in config.run.iterdir()} == {"config.yaml"}


# --- texts from the data ----------------------------------------------------------------------------------------------


def test_no_text_is_markup_in_tensorboard() -> None:
    """Through the renderer that TensorBoard itself uses."""
    shown = markdown_to_safe_html(trackers.markdown_table(["id", "prompt"], [[HOSTILE, "x" * 5000], ["    indented\n\n* item", None]]))
    assert shown.count("<tr>") == 3
    assert shown.count("<td>") == 4
    tags = {part.split(">")[0].split(" ")[0] for part in shown.split("<")[1:]}
    assert tags <= {f"{slash}{tag}" for slash in ("", "/") for tag in ("table", "thead", "tbody", "tr", "th", "td")} | {"br", "br/"}
    first = html.unescape(shown.split("<td>")[1].split("</td>")[0].replace("<br>", "\n"))
    assert first == HOSTILE


@pytest.mark.parametrize("name", EVERY)
def test_hostile_text_arrives_as_it_is(recipe: Callable[..., RunConfig], data: dict[str, str], tmp_path: Path, name: str) -> None:
    asked = [dataclasses.replace(example, problem=HOSTILE) for example in read_examples(data["eval"])]
    held_out = write_examples(asked, tmp_path / "hostile", "eval")
    config = recipe(data={"eval": str(held_out)}, optim={"steps": 1}, trackers=[name])
    _, tables = written(train(config), name)
    assert {row[1] for rows in tables.values() for row in rows} == {HOSTILE}


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Before the models are looked for; a folder of the package's name is not the package."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed. Install it: pip install 'vaopd\[trackers\]'"):
        train(recipe(trackers=[name], student="no/such/model"))
    assert not recipe().run.exists()


def test_modes_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.wandb_mode() == "offline"
    for given, mode in {"": "offline", "offline": "offline", "online": "online", "disabled": "disabled"}.items():
        monkeypatch.setenv("WANDB_MODE", given)
        assert trackers.wandb_mode() == mode
    monkeypatch.setenv("WANDB_MODE", "onlnie")
    with pytest.raises(ConfigError, match="WANDB_MODE must be offline, online or disabled, found 'onlnie'"):
        trackers.wandb_mode()


@pytest.mark.parametrize("variable", trackers.TRACKIO_ELSEWHERE)
def test_trackio_does_not_log_elsewhere(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(trackers, "_installed", lambda name: True)
    monkeypatch.setenv(variable, "someone/space")
    with pytest.raises(ConfigError, match=f"{variable} would send the run away"):
        trackers.check(["trackio"])


@needs_trackio
def test_trackio_keeps_one_folder_in_a_process(straight: Path, recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_DIR")
    with pytest.raises(ConfigError, match="one folder for a whole process"):
        train(recipe(**RUN, trackers=["trackio"]))
    assert "TRACKIO_DIR" not in os.environ


# --- nothing leaves the machine ---------------------------------------------------------------------------------------


@needs_wandb
@needs_trackio
def test_a_killed_process_and_a_network_that_nobody_uses(tmp_path: Path, pair: Pair, data: dict[str, str]) -> None:
    """`vaopd train` in its own process, killed while the trackers' threads still hold rows, and resumed.

    Every way out is a proxy that counts who knocks, and a token lies where the hub's packages find it. trackio is in the run's folder.
    """
    config = make_config(tmp_path / "run", pair, data, **RUN, trackers=["tensorboard", "wandb", "trackio"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    kill = "import os; from vaopd.train import loop; save = loop._save; "
    kill += "loop._save = lambda run, step: (save(run, step), os._exit(9) if step == 2 else None); "
    knocks: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=listen, args=(door, knocks), daemon=True).start()
        environment = surroundings(tmp_path, f"http://127.0.0.1:{door.getsockname()[1]}")
        for code, resume, expected in ((kill, [], 9), ("", ["--resume"], 0)):
            program = f"{code}import sys; from vaopd.cli import main; sys.argv[0] = 'vaopd'; main()"
            command = [sys.executable, "-c", program, "train", str(recipe), "--no-report", *resume]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == expected, done.stdout + done.stderr
        assert knocks == []
    assert (config.run / "trackio" / "vaopd.db").exists()
    assert "W&B offline: send it with `wandb sync " in done.stdout.replace("\n", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRACKIO_DIR")
        for name in config.trackers:
            assert_mirrors(config.run, name)


def listen(door: socket.socket, knocks: list[bytes]) -> None:
    while True:
        try:
            visitor, _ = door.accept()
        except OSError:
            return
        knocks.append(visitor.recv(200))
        visitor.close()


def surroundings(home: Path, proxy: str) -> dict[str, str]:
    """This process' environment with another home, a token, and one way out."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    ways = {spelling: proxy for name in names for spelling in (name, name.lower())}
    dropped = ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "TRACKIO_DIR")
    # WANDB_SERVICE, too: it would make a process that has W&B in it share this one's.
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("WANDB_")}
    return {**kept, **ways, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_TOKEN": "hf_" + "a" * 34, "OMP_NUM_THREADS": "1"}
