"""One process of lmms-eval: its command line and environment, what is believed of its output, what is kept. The real one: tests/lmms."""

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vaopd.errors import CheckpointError, ConfigError, DataError, EvaluationError
from vaopd.evaluate.lmms_benchmarks import BENCHMARKS, score
from vaopd.evaluate.lmms_judge import Relay
from vaopd.evaluate.lmms_run import UNREACHABLE, Settings, command, environment, finished, graded, read_output, run, versions

AI2D = BENCHMARKS["ai2d"]
SETTINGS = Settings("ai2d", "/models/mine", "abc", "vaopd", "", 1.0, 128, 7, None, None)


def options(arguments):
    return dict(zip(arguments[3:-1:2], arguments[4:-1:2], strict=True))


def sample(i, right, text="A", tokens=3):
    return {"doc_id": i, "exact_match": float(right), "filtered_resps": [text], "token_counts": [{"output_tokens": tokens}]}


def test_every_sample_has_a_seed_of_its_own_and_the_protocols_temperature():
    first, third = (options(command("python", AI2D, SETTINGS, number, None, 16)) for number in (1, 3))
    assert first["--model_args"] == "pretrained=/models/mine,sample=0,seed=7"
    assert third["--model_args"] == "pretrained=/models/mine,sample=2,seed=7"
    assert first["--gen_kwargs"] == "temperature=1.0,top_p=1.0,do_sample=True,max_new_tokens=128,seed=7"
    assert third["--gen_kwargs"].endswith("seed=9")
    assert third["--seed"] == "9"
    assert first["--tasks"] == "ai2d"
    assert "--use_cache" not in first
    assert "--limit" not in first


@pytest.mark.parametrize(
    ("backend", "model_args", "says"),
    [
        ("vllm", "tensor_parallel_size=2", "model=/models/mine,tensor_parallel_size=2"),
        ("async_openai", "base_url=http://127.0.0.1:8000/v1", "model_version=/models/mine,base_url=http://127.0.0.1:8000/v1"),
        ("qwen3_vl", "", "pretrained=/models/mine"),
    ],
)
def test_other_backends_name_the_model_in_their_own_way(backend, model_args, says):
    arguments = options(command("python", AI2D, replace(SETTINGS, backend=backend, model_args=model_args), 1, None, 16))
    assert (arguments["--model"], arguments["--model_args"]) == (backend, says)


def test_no_judge_of_the_users_shell_is_asked(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_API_URL", "OPENAI_BASE_URL", "AZURE_API_KEY", "JUDGE_API_KEY", "USE_LLM_JUDGE", "MODEL_VERSION"):
        monkeypatch.setenv(name, "of-the-shell")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    alone, judged = environment(None), environment(Relay("http://127.0.0.1:1234/v1/chat/completions", "token"))
    assert "of-the-shell" not in [*alone.values(), *judged.values()]
    assert alone["OPENAI_API_URL"] == UNREACHABLE
    assert judged["OPENAI_API_URL"] == "http://127.0.0.1:1234/v1/chat/completions"
    assert judged["OPENAI_API_KEY"] == "token"
    assert alone["HF_HOME"] == "/data/hf"


def test_the_relay_is_asked_past_a_proxy_and_the_judges_key_stays_here(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "hub.example")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("MY_KEY", "the-judges-key\n")
    found = environment(Relay("http://127.0.0.1:1234/v1/chat/completions", "token"), "the-judges-key")
    assert found["NO_PROXY"] == found["no_proxy"] == "127.0.0.1,hub.example"
    assert found["HTTP_PROXY"] == "http://proxy.example:3128"
    assert "MY_KEY" not in found


def test_a_score_is_believed_when_lmms_eval_has_the_same():
    samples = [sample(0, 1, tokens=128), sample(1, 0), sample(2, 1), sample(3, 1)]
    result = graded(AI2D, SETTINGS, {"exact_match,flexible-extract": 0.75}, samples, judged=0)
    assert (result.score, result.questions, result.tokens, result.truncated) == (75, 4, 137 / 4, 1 / 4)
    with pytest.raises(EvaluationError, match=r"lmms-eval reports 50\.00 and its samples have 75\.00"):
        graded(AI2D, SETTINGS, {"exact_match,none": 0.5}, samples, judged=0)


def test_of_a_part_of_a_benchmark_lmms_evals_share_of_the_whole_is_no_contradiction():
    ocr = BENCHMARKS["ocrbench"]
    samples = [{"doc_id": i, "ocrbench_accuracy": {"score": 1}, "filtered_resps": ["x"]} for i in range(10)]
    few = {"ocrbench_accuracy,none": 10 / 1000}
    assert graded(ocr, replace(SETTINGS, limit=10), few, samples, judged=0).score == 100
    with pytest.raises(EvaluationError, match=r"reports 1\.00"):
        graded(ocr, SETTINGS, few, samples, judged=0)


def test_an_answer_that_failed_is_no_answer():
    samples = [sample(0, 1), sample(1, 0, text="[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.")]
    with pytest.raises(EvaluationError, match=r"ai2d: 1 of 2 answers failed.*Connection error"):
        graded(AI2D, SETTINGS, {"exact_match,none": 0.5}, samples, judged=0)


def test_a_part_of_the_score_without_a_question_is_said():
    """WeMath's score is over problems of several steps, and the first questions may have none."""
    samples = [{"doc_id": 0, "wemath_loose": {"key": "1steps", "ID": 0, "acc_score": 1.0}, "filtered_resps": ["A"]}]
    with pytest.raises(EvaluationError, match="wemath: none of its 1 questions counts"):
        graded(BENCHMARKS["wemath"], replace(SETTINGS, limit=1), {}, samples, judged=0)


def test_samples_of_another_version_are_refused():
    with pytest.raises(EvaluationError, match=r"can't be read.*0\.7\.3"):
        graded(AI2D, SETTINGS, {"exact_match,none": 0.5}, [{"doc_id": 0, "filtered_resps": ["A"]}], judged=0)


def test_output_is_whole_and_alone(tmp_path):
    folder = tmp_path / "models__mine"
    folder.mkdir()
    with pytest.raises(DataError, match="0 results files"):
        read_output(tmp_path, "ai2d")
    (folder / "1_results.json").write_text(json.dumps({"results": {"ai2d": {"exact_match,none": 1}}}))
    text = "one\u2028line"  # a line separator of Unicode, in a line of JSON
    (folder / "1_samples_ai2d.jsonl").write_text(json.dumps(sample(0, 1, text=text), ensure_ascii=False) + "\n", encoding="utf-8")
    results, samples = read_output(tmp_path, "ai2d")
    assert results == {"exact_match,none": 1}
    assert samples == [sample(0, 1, text=text)]
    (folder / "2_results.json").write_text("{}")
    with pytest.raises(DataError, match="2 results files"):
        read_output(tmp_path, "ai2d")


def fake_lmms_eval(folder: Path, body: str) -> str:
    """A program in the place of Python with lmms-eval; it is told the arguments of lmms-eval."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport json, os, pathlib, sys\nout = pathlib.Path('out/m'); out.mkdir(parents=True)\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


ANSWERS = f"""
print("Evaluation tracker args: token=" + os.environ["HF_TOKEN"])
print("answered 1 of 1", flush=True)
(out / "1_results.json").write_text(json.dumps({{"results": {{"ai2d": {{"exact_match,none": 1.0}}}}}}))
(out / "1_samples_ai2d.jsonl").write_text(json.dumps({sample(0, 1)!r}))
"""


def go(folder, python, settings=SETTINGS, judge=None, told=lambda text: None):
    return run(folder, AI2D, settings, 1, python=python, include=None, rows=4, judge=judge, on_progress=told)


def test_a_sample_is_kept_whole_without_secrets_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    told = []
    folder = tmp_path / "ai2d" / "sample-1"
    stale = folder.with_name("sample-1.unfinished") / "out" / "gpt_response"
    stale.mkdir(parents=True)  # of a run that was killed: HallusionBench would take its verdicts for these answers'
    result = go(folder, fake_lmms_eval(tmp_path, ANSWERS), told=told.append)
    assert score(result.parts) == 100
    assert told == ["1 of 1"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sample-1"]
    assert not (folder / "out" / "gpt_response").exists()
    assert "hf_secretsecret" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert finished(folder, SETTINGS) == result
    assert finished(tmp_path / "ai2d" / "sample-2", SETTINGS) is None


def test_a_sample_of_other_settings_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    go(tmp_path / "s", fake_lmms_eval(tmp_path, ANSWERS))
    with pytest.raises(CheckpointError, match=r"other settings: temperature was 1\.0, is 0\.7.*another --out"):
        finished(tmp_path / "s", replace(SETTINGS, temperature=0.7))
    with pytest.raises(CheckpointError, match="weights was abc, is def"):
        finished(tmp_path / "s", replace(SETTINGS, weights="def"))
    (tmp_path / "s" / "sample.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        finished(tmp_path / "s", SETTINGS)
    (tmp_path / "s" / "sample.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no sample\.json. Delete the folder"):  # the new one could not take its place
        finished(tmp_path / "s", SETTINGS)


def test_a_failure_shows_the_end_of_the_log_and_keeps_nothing(tmp_path):
    python = fake_lmms_eval(tmp_path, "print('\\x1b[31mDatasetNotFoundError: lmms-lab/ai2d\\x1b[0m')")  # and status 0, as lmms-eval's is
    with pytest.raises(EvaluationError, match="ended with status 0 and no result") as error:
        go(tmp_path / "s", python)
    assert "  DatasetNotFoundError: lmms-lab/ai2d" in str(error.value)
    assert not (tmp_path / "s").exists()


def test_a_judge_without_a_verdict_ends_the_sample_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    channel = Relay("http://127.0.0.1:9", "token")
    python = fake_lmms_eval(tmp_path, ANSWERS + "\nimport time; time.sleep(60)")
    with pytest.raises(EvaluationError, match=r"no verdict on an answer \(HTTP 500\)"):
        go(tmp_path / "s", python, judge=channel, told=lambda text: channel.failures.append("HTTP 500"))
    assert not (tmp_path / "s").exists()


def test_a_python_without_lmms_eval_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="isn't installed"):
        versions(sys.executable)
    with pytest.raises(ConfigError, match="can't be run as Python"):
        versions(str(tmp_path / "nowhere"))
    assert os.access(sys.executable, os.X_OK)
