"""vaopd beside the real lmms-eval 0.7.3, in the environment that `make test-lmms` makes: no benchmark's data, but their real code."""

import json
import os
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from judge_server import judge_server
from vaopd.cli import main
from vaopd.config import WorldConfig
from vaopd.errors import EvaluationError
from vaopd.evaluate.grade import is_correct
from vaopd.evaluate.lmms_benchmarks import BENCHMARKS, BY_RULE, average, score
from vaopd.evaluate.lmms_judge import Judge, relay
from vaopd.evaluate.lmms_run import Settings, run
from vaopd.world.data import export_world

PYTHON = os.environ["VAOPD_LMMS_PYTHON"]  # `make test-lmms` sets it; without lmms-eval there is nothing to test here
SOURCE = Path(__file__).parents[2] / "src" / "vaopd"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Made rows in the columns of each benchmark, and task files that give them to lmms-eval's own code."""
    folder = tmp_path_factory.mktemp("made")
    script = Path(__file__).parent / "made_data.py"
    subprocess.run([PYTHON, script, folder, SOURCE / "evaluate" / "lmms_tasks"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("benchmark", "made_name", "answer", "percent"),
    [
        # strict (1 + 1/2 + 0 + 0 + 0) / 5, loose (1 + 1/2 + 1 + 1 + 0) / 5
        (BENCHMARKS["wemath"], "wemath", "<answer>A</answer>", 50),
        (BENCHMARKS["mathvista"], "mathvista", "It is seven.", 100 * 2 / 4),
        (BENCHMARKS["mathverse"], "mathverse", "C", 100 * 3 / 5),
        # four of six questions, one of three figures, two of four questions over their figures
        (BENCHMARKS["hallusionbench"], "hallusionbench", "yes", 100 * (4 / 6 + 1 / 3 + 2 / 4) / 3),
        (BY_RULE["hallusionbench"], "hallusionbench_rule", "yes", 100 * (4 / 6 + 1 / 3 + 2 / 4) / 3),
        (BENCHMARKS["ai2d"], "ai2d", "A", 100 * 2 / 4),
        (BENCHMARKS["mmmu"], "mmmu", "A", 100 * 2 / 5),
        (BENCHMARKS["mmstar"], "mmstar", "A", 100 * (1 / 3 + 1) / 2),
        (BENCHMARKS["ocrbench"], "ocrbench", "A", 100 * 2 / 3),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0].islower() else "",
)
def test_each_benchmark_is_scored_as_its_own_code_scores_it(made, tmp_path, benchmark, made_name, answer, percent):
    """lmms-eval's prompts, results and aggregations on made rows, all answered alike; `run` raises where its score isn't ours."""
    task = replace(benchmark, task=f"made_{made_name}", ours=False)
    settings = Settings(task.task, "dummy", None, "dummy", f"response={answer}", 1.0, 64, 1, 1000 if task.whole else None, None)
    with judge_server() as (url, asked), relay(Judge(url, "tiny-judge", "key-of-the-judge")) as channel:
        result = run(
            tmp_path / "sample-1",
            task,
            settings,
            1,
            python=PYTHON,
            include=made,
            rows=4,
            judge=channel if task.judged else None,
            on_progress=lambda text: None,
        )
    assert result.score == pytest.approx(percent, abs=1e-9)
    assert score(average([result.parts, result.parts])) == pytest.approx(percent, abs=1e-9)
    assert result.judged == len(asked) == (result.questions if task.judged else 0)
    assert {body["model"] for _, _, body in asked} <= {"tiny-judge"}  # HallusionBench asks for gpt-4 by name
    assert {headers["Authorization"] for headers, _, _ in asked} <= {"Bearer key-of-the-judge"}
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "key-of-the-judge" not in kept
    if made_name == "wemath":  # lmms-eval divides by its 525 problems: what the five lost is the same
        (results,) = tmp_path.glob("sample-1/out/*/*_results.json")
        theirs = json.loads(results.read_text())["results"][task.task]
        for metric, lost in (("wemath_strict", 5 - 1.5), ("wemath_loose", 5 - 3.5)):
            assert 525 * (1 - float(theirs[f"{metric},none"].rstrip("%")) / 100) == pytest.approx(lost, abs=0.03)
    if made_name == "ocrbench":
        (results,) = tmp_path.glob("sample-1/out/*/*_results.json")
        assert json.loads(results.read_text())["results"][task.task]["ocrbench_accuracy,none"] == pytest.approx(2 / 1000)


def test_a_judge_that_refuses_leaves_no_sample_behind(made, tmp_path):
    """lmms-eval would count all five answers as wrong and end with status 0."""
    task = replace(BENCHMARKS["mathverse"], task="made_mathverse")
    settings = Settings(task.task, "dummy", None, "dummy", "response=C", 1.0, 64, 1, None, "tiny-judge")
    with (
        judge_server(status=401) as (url, asked),
        relay(Judge(url, "tiny-judge")) as channel,
        pytest.raises(EvaluationError, match=r"mathverse, sample 1: the judge gave no verdict on an answer \(HTTP 401"),
    ):
        run(tmp_path / "s", task, settings, 1, python=PYTHON, include=made, rows=4, judge=channel, on_progress=lambda text: None)
    assert asked
    assert not (tmp_path / "s").exists()


def test_the_built_in_world_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Two samples of a local task at temperature 1, the mean graded here again, and a second call that runs nothing."""
    folder, out = tmp_path / "task", tmp_path / "out"
    shutil.copytree(Path(__file__).parent / "world", folder)
    export_world(WorldConfig(train=1, eval=1, test=24, seed=3), folder)
    arguments = ["lmms-eval", "builtin:student", "--tasks", "built_in_world=correct", "--include-path", folder, "--out", out]
    arguments += ["--k", 2, "--max-tokens", 64, "--rows", 8]
    monkeypatch.setattr("sys.argv", ["vaopd", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    result = json.loads((out / "benchmarks.json").read_text())["benchmarks"]["built_in_world"]

    answers = [row["answer"] for row in pyarrow.parquet.read_table(folder / "test.parquet").to_pylist()]
    texts = []
    for number in (1, 2):
        (file,) = out.glob(f"built_in_world/sample-{number}/out/*/*_samples_built_in_world.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        texts.append([row["filtered_resps"] for row in rows])
    graded = [[is_correct(text, answer) for text, answer in zip(sample, answers, strict=True)] for sample in texts]
    assert result["samples"] == pytest.approx([100 * sum(sample) / 24 for sample in graded])
    assert 0 < result["mean"] < 100
    assert result["mean"] == pytest.approx(sum(result["samples"]) / 2)
    means = [sum(pair) / 2 for pair in zip(*graded, strict=True)]
    assert result["se"] == pytest.approx(100 * statistics.stdev(means) / 24**0.5)
    # Temperature 0 and a limit of 16 tokens stand in the task's file: the command line's hold, and every sample is drawn anew.
    assert sum(a == b for a, b in zip(*texts, strict=True)) < 12
    assert result["tokens"] > 16

    monkeypatch.setattr("vaopd.evaluate.lmms.run", lambda **_: pytest.fail("a finished sample is run again"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert "2 of 2 samples are there already" in told
    assert f"{result['mean']:.1f} ± {result['se']:.1f}" in told


def test_the_response_cache_keeps_nothing_that_was_sampled():
    """It is never switched on here; were it, one sample would come back k times."""
    program = (
        "from lmms_eval.caching.response_cache import is_deterministic as d\n"
        "assert not d('generate_until', {'temperature': 1.0, 'do_sample': True}) and d('generate_until', {'temperature': 0})"
    )
    subprocess.run([PYTHON, "-c", program], check=True, capture_output=True)


def test_the_backend_shows_a_task_its_system_prompt_texts_and_pictures_in_their_places():
    program = """
from PIL import Image
from vaopd.data.render import Renderer
from vaopd.errors import DataError
from vaopd.evaluate.lmms_model import as_example, with_system
from vaopd.models.load import open_source
text = lambda t: {"type": "text", "text": t}
picture = {"type": "image", "url": Image.new("L", (64, 64))}
user = {"role": "user", "content": [text("What is "), picture, text("this?")]}
system, example = as_example("made/0", [{"role": "system", "content": [text("Be brief.")]}, user])
processor = open_source("builtin:student").processor
for shown in (with_system(processor, system), processor):
    print(ascii(processor.tokenizer.decode(Renderer(shown)(example).ids_P)))
for messages in ([user, {"role": "assistant", "content": []}], [{"role": "user", "content": [picture, text("<image>")]}]):
    try: as_example("made/1", messages)
    except DataError as error: print(error)
"""
    done = subprocess.run([PYTHON, "-c", program], check=True, capture_output=True, text=True)
    begun, plain, turns, marked = done.stdout.splitlines()[-4:]
    pictures = "<|vision_start|>" + 16 * "<|image_pad|>" + "<|vision_end|>"
    asked = rf"<|im_start|>user\nWhat is {pictures}this?<|im_end|>\n<|im_start|>assistant\n"
    assert plain == f"'{asked}'"
    assert begun == rf"'<|im_start|>system\nBe brief.<|im_end|>\n{asked}'"
    assert "question 'made/1' has the turns user, assistant" in turns
    assert "'<image>' in it" in marked
