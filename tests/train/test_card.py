"""The model card: what it says, and that nobody's text becomes markup, HTML or metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from small_pair import Pair
from vaopd.config import RunConfig, parse_config
from vaopd.models.export import Export
from vaopd.train.card import METHODS, DataFile, _code, _fenced, model_card, package_versions
from vaopd.train.loop import train

RESULT: dict[str, Any] = {
    "questions": 320,
    "k": 8,
    "models": {
        "student": {"accuracy": 0.476, "se": 0.018, "blind_degraded": 0.189, "blind_removed": 0.048, "va": 0.0821, "tokens": 32.1},
        "trained": {"accuracy": 0.595, "se": None, "blind_degraded": None, "blind_removed": None, "va": None, "tokens": 32.14},
    },
    "gain": {"points": 11.9, "low": 9.5, "high": 14.3},
}


def card(result: dict[str, Any] | None = RESULT, export: Export | None = None, revision: str | None = "abc123", **changes: Any) -> str:
    values = {"run": "/home/someone/runs/mine", "student": "Qwen/Qwen3-VL-2B-Instruct", "teacher": "/models/secret/big"}
    values |= {"data": {"train": "/data/here/train.jsonl", "eval": "eval.jsonl"}, **changes}
    return model_card(
        parse_config(values),
        base_revision=revision,
        data=[DataFile("train", "train.jsonl", 2048, "f00d")],
        steps=200,
        best={"step": 150, "accuracy": 0.6, "kl": 0.1},
        export=export or Export("bfloat16", 0.987),
        result=result,
        versions={"vaopd": "0.1.0"},
    )


def metadata(text: str) -> dict[str, Any]:
    """What Hugging Face reads: the YAML between the first two lines of three dashes."""
    start, block, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    return yaml.safe_load(block)


def without_code(text: str) -> str:
    """The card's own words: no metadata, fenced blocks and code spans, each found as CommonMark does, by runs of backticks."""
    body = text.split("---\n", 2)[2]
    body = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)


def test_metadata() -> None:
    assert metadata(card(lora={})) == {
        "base_model": "Qwen/Qwen3-VL-2B-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vaopd", "knowledge-distillation", "on-policy-distillation", "vision-language-model", "va-opd", "lora"],
    }
    assert "lora" not in metadata(card())["tags"]


@pytest.mark.parametrize("student", ["/models/mine", "./models", "builtin:student", "~/model", "a/b/c"])
def test_a_base_that_is_no_hub_name_is_no_metadata(student: str) -> None:
    assert "base_model" not in metadata(card(student=student))


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert metadata(card(student="models/small"))["base_model"] == "models/small"
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert "base_model" not in metadata(card(student="models/small"))


def test_it_says_what_was_done() -> None:
    text = card()
    assert "`Qwen/Qwen3-VL-2B-Instruct` (revision `abc123`), trained with `va_opd`, taught by `big`." in text
    assert "https://arxiv.org/abs/2605.21924" in text
    assert "a_t = max(log p_T(y_t | v, q, y_<t) − log p_T(y_t | ṽ, q, y_<t), 0)" in text
    assert "* train: `train.jsonl`, 2048 rows, SHA-256 `f00d`" in text
    assert "after step 150 of 200" in text
    assert "K = 4 for each prompt, at temperature 0.7 and top-p 0.95" in text
    assert "bfloat16" in text
    assert "98.7 %" in text


def test_metrics_with_intervals_and_gaps() -> None:
    text = card()
    assert "| student | 47.6 (44.1 to 51.1) | 18.9 | 4.8 | 0.082 | 32.1 |" in text
    assert "| trained | 59.5 | – | – | – | 32.1 |" in text
    assert "trained against student: +11.9 points, 95 % interval +9.5 to +14.3, paired by question." in text
    assert "Nothing was measured" in card(None)
    assert "which favours the trained model" in text
    assert "which favours the trained model" not in card(data={"train": "a.jsonl", "eval": "b.jsonl", "test": "c.jsonl"})


def test_the_recipe_reads_back_and_names_no_place_of_this_machine() -> None:
    text = card(lora={"rank": 8})
    assert not re.search("someone|secret|/data/here|/models", text)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    config = parse_config(yaml.safe_load(block))
    assert (config.lora.rank if config.lora else 0, config.optim.lr, str(config.data.train)) == (8, 1e-6, "train.jsonl")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_words(method: str) -> None:
    text = card(method=method)
    assert METHODS[method] in text
    assert ("The answers are the student's own" in text) == (method not in ("off_policy_kd", "sft"))
    assert ("`nll`" in text) is False


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [("va_opd", "absolute", "a_t is the size of that difference"), ("opd", "per_token", "`c_t = 1 / Σ_k T_k`")],
)
def test_a_rule_that_is_not_the_papers_is_told(method: str, option: str, words: str) -> None:
    assert words in card(method={method: {option: True}})
    assert words not in card(method={method: {option: False}})


def test_the_student_as_its_own_teacher() -> None:
    text = card(method="sft", teacher="student", lora={})
    assert "taught by itself before training" in text
    assert "\nteacher: student\n" in text


HOSTILE = [
    "a\n---\nlicense: mit\n---\n# stolen",
    "<script>alert(1)</script>",
    "![x](https://evil.example/x.png)",
    "``` \n\n# heading\n\n```` <img src=x onerror=alert(1)>",
    "`<b>` | cell | [link](javascript:alert(1))",
    "a\u202eb\x1b[31m\u2028<i>",
    "base_model: evil/model",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    made = model_card(
        parse_config({"run": text, "student": text, "teacher": text, "data": {"train": f"{text}.jsonl"}, "lora": {"targets": [text]}}),
        base_revision=text,
        data=[DataFile("train", f"{text}.jsonl", 1, "00")],
        steps=1,
        best=None,
        export=Export("float32", None),
        result=None,
        versions={"vaopd": text},
    )
    assert metadata(made).keys() == {"library_name", "pipeline_tag", "tags"}
    own = without_code(made)
    assert [line for line in own.splitlines() if line.startswith("#")] == ["# , distilled", *OWN_HEADINGS]
    assert not re.search("<|evil|alert|stolen|license|onerror", own)
    assert own.count("](") == 1, "the paper's link"
    assert not re.search("[\u202e\x1b\u2028]", made)


OWN_HEADINGS = [f"## {title}" for title in ("Method", "How to load it", "Metrics", "Data", "Weights", "Recipe", "Versions", "Limits")]


@given(st.text())
def test_a_code_span_holds_any_text(text: str) -> None:
    span = _code(text)
    assert "\n" not in span
    ticks = re.match("`+", span)
    assert ticks
    inside = span[len(ticks[0]) : -len(ticks[0])]
    assert span.endswith(ticks[0])
    assert ticks[0] not in re.findall("`+", inside)


@given(st.text(alphabet="`a\n "))
def test_a_fenced_block_holds_any_text(text: str) -> None:
    first, *inside, last = _fenced(text, "yaml").split("\n")
    assert first == f"{last}yaml"
    assert set(last) == {"`"}
    assert not any(line.strip().startswith(last) for line in inside)


def test_versions() -> None:
    found = package_versions()
    assert found["transformers"] == transformers.__version__
    assert {"python", "vaopd", "torch"} <= found.keys()


def test_a_run_writes_its_card(recipe: Callable[..., RunConfig], data: dict[str, str]) -> None:
    folder = train(recipe(optim={"steps": 1}, method="opd", eval={"every": 1, "baselines": True}))
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert f"trained against student: {result['gain']['points']:+.1f} points" in text
    for role in ("train", "eval"):
        content = Path(data[role]).read_bytes()
        assert f"* {role}: `{role}.jsonl`, {len(content.splitlines())} rows, SHA-256 `{hashlib.sha256(content).hexdigest()}`" in text
    assert "* test:" not in text
    assert "float32" in text
    assert str(folder.parent) not in text


def test_the_lines_that_load_it_work(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand in the card; only the processor's class is ours, since transformers' own needs torchvision."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card(), flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 7
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda folder: pair.source.processor)
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/or/name/of/this/model", str(pair.student_folder)).replace("256", "2"), {})
    assert "How many?" in capsys.readouterr().out
