"""`model/README.md`: the trained model's card in Hugging Face's form, made of what the run knows about itself.

Texts of recipes, data and models go into code spans and fenced blocks that they cannot close, and into YAML through its own writer, so
that none of them becomes markup, HTML or a metadata field.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from vaopd.config import DataConfig, RunConfig
from vaopd.data.tables import content_digest
from vaopd.models.export import Export
from vaopd.train.folder import RunFolder
from vaopd.train.setup import Run

PAPER = "https://arxiv.org/abs/2605.21924"
PACKAGES = ("vaopd", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "peft", "numpy", "pillow")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_ADVANTAGE = "`a_t = max(log p_T(y_t | v, q, y_<t) − log p_T(y_t | ṽ, q, y_<t), 0)`"
_LOSS = "`L = mean over prompts of Σ_t c_t · D_t`, with D_t the {divergence} between student and teacher over the whole vocabulary"
# What a method's coefficients c_t are (vaopd.core.weighting); the symbols are those of the paper.
METHODS = {
    "va_opd": f"Visual-advantage on-policy distillation. {_ADVANTAGE}, `z_k = (ā_k − μ) / (σ + ε)` over the siblings, "
    "`w_k = softmax_k(z_k / τ)`, and `c_t = w_k · λ / |V_k|` for the visual tokens V_k, the top p_v of response k by a_t, "
    "`c_t = w_k · (1 − λ) / |L_k|` for the others (eq. 2 to 6).",
    "opd": "On-policy distillation, the paper's baseline: `c_t = 1 / (K · T_k)` (eq. 1).",
    "rollout_only": f"An ablation of VA-OPD: {_ADVANTAGE}, and `c_t = w_k / T_k` (eq. 2 to 4 without 5).",
    "token_only": f"An ablation of VA-OPD: {_ADVANTAGE}, and eq. 5 with `w_k = 1 / K`.",
    "random_tokens": "A control of VA-OPD: its rollout weights, and as many visual tokens, drawn at random.",
    "mask_tokens": "The paper's masking probe: on-policy distillation without a share of each response's tokens.",
    "off_policy_kd": "Distillation on the data's solutions instead of the student's own answers: `c_t = 1 / T`.",
    "sft": "Supervised fine-tuning on the data's solutions: `L = mean over prompts of mean_t −log p_S(y_t | v, q, y_<t)`; no teacher.",
}
VARIANTS = {
    "absolute": "Other than in the paper, a_t is the size of that difference, whatever its sign.",
    "per_token": "Other than in the paper, every token of a prompt's answers weighs the same: `c_t = 1 / Σ_k T_k`.",
}


@dataclass(frozen=True)
class DataFile:
    """One data file of a run."""

    role: str  # train, eval, test
    name: str  # without its folder
    rows: int
    sha256: str
    skipped: int = 0  # rows that could not be used


def write_card(run: Run, export: Export, result: Mapping[str, Any] | None) -> None:
    """Write `model/README.md` of a finished run; `result` is its eval.json, None where there was nothing to evaluate on."""
    text = model_card(
        run.config,
        base_revision=getattr(run.source.config, "_commit_hash", None),
        data=_data_files(run),
        steps=run.steps,
        best=run.state["best"],
        export=export,
        result=result,
        versions=package_versions(),
    )
    RunFolder(run.folder.path / "model").write_text("README.md", text)


def model_card(
    config: RunConfig,
    *,
    base_revision: str | None,
    data: Sequence[DataFile],
    steps: int,
    best: Mapping[str, Any] | None,
    export: Export,
    result: Mapping[str, Any] | None,
    versions: Mapping[str, str],
) -> str:
    """The card's text: metadata, method, recipe, data, metrics, versions, how to load it, limits."""
    name = _code(_short(config.student))
    revision = f" (revision {_code(base_revision)})" if base_revision else ""
    teacher = _code(_short(config.teacher)) if config.teacher and not config.self_taught else None
    sections = {
        "Method": _method(config),
        "How to load it": _loading(),
        "Metrics": _metrics(config, result, steps, best),
        "Data": _data(data),
        "Weights": _weights(config, export),
        "Recipe": f"For `vaopd train`; of paths the last part is given.\n\n{_fenced(_recipe(config), 'yaml')}",
        "Versions": ", ".join(f"{package} {_code(number)}" for package, number in versions.items()) + ".",
        "Limits": _limits(config),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    by = f", taught by {teacher}" if teacher else ", taught by itself before training" if config.self_taught else ""
    lead = f"{name}{revision}, trained with {_code(str(config.method))}{by}."
    return f"---\n{_metadata(config)}---\n\n# {name}, distilled\n\n{lead}\n\n{body}\n"


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's and that of every package which is installed; default: those that have a say in a run's result."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # peft, without the extra
            continue
    return found


def _metadata(config: RunConfig) -> str:
    """Hugging Face's fields. `base_model` has to be a hub name, so a model from a folder has none."""
    tags = ["vaopd", "knowledge-distillation", "on-policy-distillation", "vision-language-model", config.method.name.replace("_", "-")]
    tags += ["lora"] if config.lora else []
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": tags}
    if _is_hub_name(config.student):
        values = {"base_model": config.student, "base_model_relation": "finetune", **values}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=False)


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _method(config: RunConfig) -> str:
    text = " ".join([METHODS[config.method.name], *(said for option, said in VARIANTS.items() if config.method.numbers.get(option))])
    if config.loss != "nll":
        text += " " + _LOSS.format(divergence=_code(config.loss)) + "."
    if not config.method.off_policy:
        r = config.rollouts
        text += (
            f" The answers are the student's own: K = {r.k} for each prompt, at temperature {r.temperature:g} and top-p {r.top_p:g}, "
            f"at most {r.max_tokens} tokens."
        )
        if config.method.name != "opd":
            text += f" ṽ is the image after {_code(config.view.name)}."
    return f"{text}\n\nPaper: [arXiv 2605.21924]({PAPER})."


def _loading() -> str:
    code = (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        'folder = "path/or/name/of/this/model"\n'
        'model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto")\n'
        "processor = AutoProcessor.from_pretrained(folder)\n"
        'chat = [{"role": "user", "content": [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "How many?"}]}]\n'
        "inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')\n"
        "print(processor.decode(model.generate(**inputs.to(model.device), max_new_tokens=256)[0]))\n"
    )
    return _fenced(code, "python")


def _metrics(config: RunConfig, result: Mapping[str, Any] | None, steps: int, best: Mapping[str, Any] | None) -> str:
    chosen = f"The weights are those after step {best['step']} of {steps}" if best else f"The weights are those after {steps} steps"
    if not (config.data.eval or config.data.holdout):
        chosen += ", the last."
    else:
        chosen += ", the best by held-out accuracy (by the divergence from the teacher where the data has no answers)."
    if not result or not result.get("models"):
        return f"{chosen} Nothing was measured: the recipe has neither `data.eval` nor `data.test`."
    rows = ["| model | accuracy, % (95 % interval) | image degraded | no image | mean VA, nats | tokens |", "|---|---|---|---|---|---|"]
    rows += [_metrics_row(role, result["models"][role]) for role in ("student", "trained", "teacher") if role in result["models"]]
    gain = result.get("gain")
    asked = (
        f"{result['questions']} questions, {result['k']} samples each at temperature {config.eval.temperature:g} (avg@{result['k']}); "
        "intervals are over questions. `student` is the model before training. VA is the visual advantage of the model's own answers."
    )
    table = f"{chosen} {asked}\n\n" + "\n".join(rows)
    if not gain:
        return table
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}"
    return f"{table}\n\ntrained against student: {gain['points']:+.1f} points, {interval}, paired by question."


def _metrics_row(role: str, entry: Mapping[str, Any]) -> str:
    accuracy, error = entry.get("accuracy"), entry.get("se")
    interval = "–" if accuracy is None else f"{100 * accuracy:.1f}"
    if accuracy is not None and error is not None:
        interval += f" ({100 * (accuracy - 1.96 * error):.1f} to {100 * (accuracy + 1.96 * error):.1f})"
    blind = [_number(entry.get(key), 100, 1) for key in ("blind_degraded", "blind_removed")]
    return f"| {role} | {interval} | {' | '.join(blind)} | {_number(entry.get('va'), 1, 3)} | {_number(entry.get('tokens'), 1, 1)} |"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"


def _data(data: Sequence[DataFile]) -> str:
    lines = [
        f"* {file.role}: {_code(file.name)}, {file.rows} rows{f' ({file.skipped} more could not be used)' if file.skipped else ''}, "
        f"SHA-256 `{file.sha256}`"
        for file in data
    ]
    return "\n".join(lines) + "\n\nThe sums are those of the files of rows; pictures that such a file only names are not in them."


def _weights(config: RunConfig, export: Export) -> str:
    text = f"safetensors in {export.dtype}, the precision of the base."
    if export.kept is not None:
        text += f" Training was in float32; rounding left {100 * export.kept:.1f} % of what it changed, along the change."
    if config.lora:
        text += (
            f" Trained as adapters of rank {config.lora.rank}, alpha {config.lora.alpha:g} (LoRA, arXiv 2106.09685), and merged here. "
            "The metrics are those of the adapted model in the precision of its training."
        )
    return text


def _limits(config: RunConfig) -> str:
    limits = [
        "One training run with one seed: the intervals are over questions, not over repetitions of the training.",
        "The student learns the teacher's mistakes, and its base's terms of use and limits go on to hold.",
        "Answers were graded by rule: the last boxed value, stated answer or number.",
    ]
    if (config.data.eval or config.data.holdout) and not config.data.test:
        limits.append("The questions that chose the checkpoint are those of the final metrics, which favours the trained model.")
    return "\n".join(f"* {limit}" for limit in limits)


def _data_files(run: Run) -> list[DataFile]:
    data = run.config.data
    found = []
    for role, path, rows in (("train", data.train, run.train), ("eval", data.eval, run.held_out), ("test", data.test, run.test)):
        if path is not None:
            skipped = sum(run.account["files"][role]["skipped"].values())
            found.append(DataFile(role, path.name, len(rows), content_digest(path), skipped))
    return found


def _recipe(config: RunConfig) -> str:
    """The recipe without where things lie on the machine that trained."""
    values = config.model_dump(mode="json")
    values |= {"run": config.run.name, "student": _short(config.student)}
    values["teacher"] = _short(config.teacher) if config.teacher and not config.self_taught else config.teacher
    values["data"] = {
        key: Path(value).name if key in ("train", "eval", "test") else value
        for key, value in values["data"].items()
        if value is not None and value != DataConfig.model_fields[key].default
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # Signs that turn the direction of writing, and their like, show themselves as escapes.
    return text if text.replace("\n", "").isprintable() else yaml.safe_dump(values, sort_keys=False)


def _short(name: str) -> str:
    """A hub name as it is; of a folder its own name, since its place is nobody's business."""
    return name if _is_hub_name(name) or name.startswith("builtin:") else Path(name).expanduser().resolve().name


def _code(text: str) -> str:
    """A code span that holds any text: one line, between more backticks than it has in a row."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line or not line else f"`{line}`"


def _fenced(text: str, language: str) -> str:
    """A fenced block that holds any text: its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}{language}\n{text}{end}{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
