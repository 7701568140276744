"""GRPO through TRL from a recipe: the baseline that learns from right answers, without a teacher.

Student, data, prompts and rollouts of a step, sampling, optimiser, schedule and evaluations are the recipe's; the loss is GRPO with TRL's
defaults and the reward 1 for a right final answer, else 0. `method` has no part in it, and the teacher none but in the evaluations.

`pip install 'vaopd[trl]'`, then `python -m vaopd.integrations.grpo RECIPE [--set KEY=VALUE]…`. The run folder has
`config.yaml`, `eval.json` and `model/` as docs/run_folder.md says, and `metrics.jsonl`, whose training rows have TRL's numbers. A run that
was stopped starts anew.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaopd.config import RunConfig, load_config
from vaopd.data.images import decode
from vaopd.data.sources import split_marks
from vaopd.errors import ConfigError, DataError, VaopdError
from vaopd.evaluate.grade import is_correct
from vaopd.models.export import export_model
from vaopd.train.evaluation import better, evaluate_step, final_evaluation
from vaopd.train.folder import RunFolder
from vaopd.train.metrics import Metrics
from vaopd.train.setup import Run, precision, set_up
from vaopd.types import Example

try:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ConfigError(f"vaopd.integrations.grpo needs TRL with its GRPOTrainer ({error}). pip install 'vaopd[trl]'") from error

LOGGED = ("loss", "reward", "grad_norm", "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "learning_rate")
Say = Callable[[str], None]


def train_grpo(config: RunConfig, say: Say = print) -> Path:
    """Run the recipe with GRPO and return its run folder.

    Raises:
        ConfigError: the recipe samples fewer than two answers to a prompt, or with adapters, a vLLM server or other than one process.
        DataError: a training question without an answer, or no held-out questions.
        ModelError: something can't be loaded.
    """
    _check(config)
    RunFolder(config.run).check(config, resume=False)
    run = set_up(config, on_check=say)
    if run.tools.accelerator.num_processes > 1:
        raise ConfigError("GRPO is run here in one process. Start it without accelerate launch")
    missing = [example.id for example in run.train if example.answer is None]
    if missing:
        raise DataError(f"GRPO rewards right answers, but {len(missing)} training questions have none, '{missing[0]}' the first")
    if not run.held_out:
        raise DataError("the best weights are chosen on held-out questions: give data.eval or data.holdout")
    with run.folder.claimed():
        run.folder.start(config.to_yaml())
        watch = _Watch(run, say)
        watch.evaluate(0)
        trainer = GRPOTrainer(
            model=run.student,
            reward_funcs=right,
            args=arguments(config, run.steps),
            train_dataset=Dataset.from_list([_row(example) for example in run.train]),
            processing_class=_left_padding(run.source.processor),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # its rows are in metrics.jsonl
        trainer.train()
        run.student.load_state_dict(watch.best)
        export_model(run.student, run.source, config.run / "model")
        result = final_evaluation(run, lambda name, done, of: None)
        run.folder.write_json("eval.json", result)
    return config.run


def right(completions: Sequence[Sequence[dict[str, str]]], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for a right final answer, else 0."""
    return [float(is_correct(messages[0]["content"], wanted)) for messages, wanted in zip(completions, answer, strict=True)]


def arguments(config: RunConfig, steps: int) -> GRPOConfig:
    """The recipe's numbers under TRL's names. One optimiser step for each batch of rollouts."""
    rollouts, optim = config.rollouts, config.optim
    return GRPOConfig(
        output_dir=str(config.run),
        per_device_train_batch_size=optim.prompts_per_step * rollouts.k,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=rollouts.k,
        max_completion_length=rollouts.max_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        max_steps=steps,
        learning_rate=optim.lr,
        lr_scheduler_type="constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        warmup_steps=optim.warmup,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        max_grad_norm=optim.clip,
        gradient_checkpointing=optim.checkpointing,
        bf16=precision(config) == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


class _Watch(TrainerCallback):
    """Rows of metrics.jsonl, CPU seconds of the steps, and the weights that were best on the held-out questions."""

    def __init__(self, run: Run, say: Say) -> None:
        self.run, self.say = run, say
        self.best: dict[str, Tensor] = {}
        self.best_row: Metrics = {}
        self.seconds = self.begun = 0.0

    def evaluate(self, step: int) -> None:
        row, _ = evaluate_step(self.run, step)
        self.run.folder.append(self.run.folder.metrics, row)
        self.say(f"step {step}: held-out accuracy {100 * row['accuracy']:.1f} %")
        if not self.best or better(row, self.best_row):
            self.best_row, self.best = row, copy.deepcopy(self.run.student.state_dict())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.process_time() - self.begun

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "reward" in logs:
            row = {name: logs[name] for name in LOGGED if name in logs}
            row |= {"kind": "train", "step": state.global_step, "cpu_seconds": round(self.seconds, 3)}
            self.run.folder.append(self.run.folder.metrics, row)
            if state.global_step % self.run.config.eval.every == 0 or state.global_step == self.run.steps:
                self.run.student.eval()
                self.evaluate(state.global_step)
                self.run.student.train()


def _check(config: RunConfig) -> None:
    """What would be trained otherwise than the recipe says."""
    if config.rollouts.k < 2:
        raise ConfigError(f"GRPO compares answers to one prompt: rollouts.k must be 2 or more, found {config.rollouts.k}")
    if config.lora or config.rollouts.engine != "hf":
        raise ConfigError("GRPO is run here with all weights and TRL's own sampling. Leave out lora and rollouts.engine")


def _row(example: Example) -> dict[str, Any]:
    """As TRL takes it, with the pictures where the question has them."""
    parts = split_marks(example.problem, len(example.images))
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    images = [decode(image) for image in example.images]
    return {"prompt": [{"role": "user", "content": content}], "images": images, "answer": example.answer}


def _left_padding(processor: Any) -> Any:
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "left"
    return processor


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train a recipe's student with GRPO through TRL.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    given = parser.parse_args()
    try:
        folder = train_grpo(load_config(given.recipe, given.overrides))
    except VaopdError as error:
        print(f"error  {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"run: {folder}")


if __name__ == "__main__":
    main()
