"""VA-OPD in TRL's DistillationTrainer: K rollouts a prompt, the teacher's second view, our coefficients, our divergence.

TRL samples, steps, logs and saves; what a step minimises is what `vaopd.train.step` minimises. Needs `pip install 'vaopd[trl]'`.

Shape letters as in vaopd.types; here R are the rows of one process' batch, K neighbours each of one prompt, padded to T.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from vaopd.config import MethodConfig, ViewConfig
from vaopd.core import (
    OPD,
    VAOPD,
    RolloutOnly,
    TokenOnly,
    Weighting,
    advantage_for,
    as_divergence,
    effective_rollouts,
    from_padded,
    fused_weighted_divergence,
    token_coefficients,
    token_log_probs,
)
from vaopd.data.render import shown_sizes
from vaopd.errors import ConfigError, DataError, did_you_mean
from vaopd.models.families import family_of
from vaopd.models.forward import head_of

WRITTEN_FOR = "1.16"
FIX = f"Install the one that this is written for: pip install 'trl=={WRITTEN_FOR}.*'"

try:
    from datasets import IterableDataset
    from trl import DistillationConfig, DistillationTrainer
    from trl import __version__ as trl_version
    from trl.data_utils import apply_chat_template
    from trl.trainer.utils import RepeatSampler, split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
except ImportError as error:
    raise ConfigError(f"vaopd.integrations.trl needs TRL {WRITTEN_FOR} with its DistillationTrainer ({error}). {FIX}") from error

log = logging.getLogger(__name__)

# What of TRL is overridden or called here, with the parameters that it has to have. None of it is TRL's public interface.
HOOKS: dict[str, tuple[str, ...]] = {
    "_get_train_sampler": ("self", "dataset"),
    "_generate": ("self", "prompts"),
    "_generate_and_score_completions": ("self", "inputs"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_compute_loss": ("self", "unwrapped_student", "inputs", "num_items_in_batch"),
    "_get_last_hidden_state": (
        *("self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"),
        *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
        *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ),
}
IMAGE_INPUTS = HOOKS["_get_last_hidden_state"][5:]

WEIGHTINGS: dict[str, type[Any]] = {"va_opd": VAOPD, "opd": OPD, "rollout_only": RolloutOnly, "token_only": TokenOnly}


def check_hooks(trainer: type, version: str) -> None:
    """Raises ConfigError unless `trainer` has every method of HOOKS with those parameters, in that order."""
    for name, expected in HOOKS.items():
        hook = getattr(trainer, name, None)
        found = None if hook is None else tuple(inspect.signature(hook).parameters)
        if found != expected:
            has = "has no such method" if found is None else f"has {name}({', '.join(found)})"
            raise ConfigError(
                f"VAOPDTrainer overrides {trainer.__name__}.{name}({', '.join(expected)}), but the installed TRL {version} {has}: "
                f"it would train on something else. {FIX}"
            )
    if not version.startswith(f"{WRITTEN_FOR}."):
        log.warning(
            "the hooks of TRL %s look like those of %s, with which this is tested; what they do may still differ", version, WRITTEN_FOR
        )


check_hooks(DistillationTrainer, trl_version)


@dataclass
class VAOPDConfig(DistillationConfig):
    """TRL's DistillationConfig with the numbers of a recipe, under a recipe's names; the defaults are a recipe's too.

    `temperature`, `top_p` and the like are of the sampling alone: the divergence is taken at temperature 1.

    Raises:
        ConfigError: an unknown method, view, option or divergence, a number that the method doesn't have or can't take, a batch that
            isn't whole prompts, TRL's own `beta`.
    """

    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, "view"]  # noqa: RUF012 (a field of a dataclass would need a default)

    k: int = field(default=4, metadata={"help": "Rollouts a prompt: neighbouring rows of the batch."})
    method: str = field(default="va_opd", metadata={"help": f"One of {', '.join(WEIGHTINGS)}."})
    tau: float | None = field(default=None, metadata={"help": "Temperature over siblings; default: the method's (1.0)."})
    lam: float | None = field(default=None, metadata={"help": "Mass of a rollout's visual tokens; default: the method's (0.5)."})
    p_visual: float | None = field(default=None, metadata={"help": "Share of visual tokens; default: the method's (0.2)."})
    view: dict[str, Any] | str = field(default="pixelate", metadata={"help": "The degraded image, as in a recipe."})
    deadband: float = field(default=1e-4, metadata={"help": "Visual advantage below it counts as zero, nats."})
    divergence: str = field(default="reverse_kl", metadata={"help": "reverse_kl, forward_kl, jsd or jsd:BETA."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weighting, self.degrade = self._weighting(), _parsed(ViewConfig, self.view, "view").make()
        if self.beta != 1.0:
            raise ConfigError(
                f"beta is TRL's name for the divergence, found {self.beta}. Leave it out and set divergence='jsd:{self.beta}'"
            )
        if self.deadband < 0:
            raise ConfigError(f"deadband is a size in nats and must be >= 0, found {self.deadband}")
        try:
            as_divergence(self.divergence)
        except ValueError as error:
            raise ConfigError(f"divergence: {error}") from None
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.k < 1 or rows % self.k:
            raise ConfigError(
                f"per_device_train_batch_size x gradient_accumulation_steps ({self.per_device_train_batch_size} x "
                f"{self.gradient_accumulation_steps} = {rows} rows) must be a multiple of k ({self.k}), so that no prompt's siblings are "
                f"split over two steps or processes. Take {max(1, rows // max(self.k, 1)) * max(self.k, 1)} rows"
            )

    def _weighting(self) -> Weighting:
        if self.method not in WEIGHTINGS:
            known = ", ".join(WEIGHTINGS)
            raise ConfigError(f"method must be one of {known}, found '{self.method}'.{did_you_mean(self.method, WEIGHTINGS)}")
        numbers = {name: value for name in ("tau", "lam", "p_visual") if (value := getattr(self, name)) is not None}
        method = _parsed(MethodConfig, {"name": self.method, "numbers": numbers}, "method")
        try:
            return WEIGHTINGS[self.method](**method.numbers)
        except ValueError as error:
            raise ConfigError(f"method '{self.method}': {error}") from None


class VAOPDTrainer(DistillationTrainer):
    """TRL's DistillationTrainer, minimising eq. 6 of arXiv 2605.21924 instead of a mean over tokens.

    The same arguments as TRL's, with a VAOPDConfig. Models are image-text-to-text models of docs/families.md, rows have `prompt` and
    `image` or `images` (PIL). Each step's rollouts are scored by the teacher when they are sampled, so the student's update needs no
    further teacher forward. TRL's metric `entropy` is not computed; `va` and `kl` (nats per token, `kl` as
    a mean over micro-batches) and `effective_rollouts` are logged.

    Raises:
        ConfigError: another kind of `args`, no local teacher, tools, a stream in place of a data set, fewer prompts than a step takes.
        ModelError: a model of an unknown family.
        DataError: an image that isn't a PIL image, or a view that changes more than pixel values.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(DistillationTrainer.__init__).bind(self, *args, **kwargs).arguments
        _check_arguments(given)
        super().__init__(*args, **kwargs)
        # Their heads are known to be plain linear layers, neither scaled nor capped.
        for model in (self.model, self.accelerator.unwrap_model(self.teacher_model)):
            family_of(model.config)
        self._pictured: tuple[list[Any], list[Any] | None] = ([], None)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """K neighbouring rows of each prompt; all micro-batches of a step draw from the same rows."""
        source, accumulated = self.train_dataset if dataset is None else dataset, self.args.gradient_accumulation_steps
        prompts = self.args.per_device_train_batch_size * accumulated * self.accelerator.num_processes // self.args.k
        if len(source) < prompts:
            raise ConfigError(
                f"a step takes {prompts} prompts, but the training data has {len(source)}, so there would be no step at all. "
                "Make per_device_train_batch_size or gradient_accumulation_steps smaller"
            )
        return RepeatSampler(
            source,
            mini_repeat_count=self.args.k,
            batch_size=prompts,
            repeat_count=accumulated,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate(self, prompts: list[Any]) -> Any:
        """As TRL's; the prompts and pictures that it saw are kept for the second view."""
        generated = super()._generate(prompts)
        self._pictured = (prompts, generated[3])
        return generated

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's padded batch, with `teacher_states` (R, T, G) and `coefficients` (R, T), zero on padding.

        `num_items_in_batch`, by which TRL divides the loss, is the number of prompts of the whole step (eq. 6), not of tokens.
        """
        batch = super()._generate_and_score_completions(inputs)
        k = self.args.k if self.model.training else 1  # TRL's evaluation has one rollout a prompt
        mask_RT = batch["completion_mask"].bool()
        _, rollout_N = from_padded(batch["completion_ids"], mask_RT)
        group_R = _groups(batch, k)
        with self.compute_loss_context_manager():  # the precision in which TRL runs the teacher
            batch["teacher_states"], a_N = self._score(batch, rollout_N)
        c_N = token_coefficients(a_N, rollout_N, group_R, self.args.weighting)
        batch["coefficients"] = c_N.new_zeros(mask_RT.shape).masked_scatter(mask_RT, c_N)
        self._log_mean("va", a_N)
        self._log_mean("effective_rollouts", effective_rollouts(batch["coefficients"].sum(1), group_R))
        batch["num_items_in_batch"] = self.accelerator.gather(torch.tensor(len(mask_RT) // k, device=mask_RT.device)).sum()
        return batch

    def _score(self, batch: dict[str, Any], rollout_N: Tensor) -> tuple[Tensor, Tensor]:
        """((R, T, G) states of the original view, (N,) eq. 2); zero where the method doesn't read the second view, or there is no image."""
        states_RTG = torch.cat([self._teacher_states(part) for part in self._micro_batches(batch)])
        original_N = self._log_probs(batch, states_RTG)
        if isinstance(self.args.weighting, OPD) or "pixel_values" not in batch:
            return states_RTG, torch.zeros_like(original_N)
        degraded = {**batch, "pixel_values": self._degraded_pixels(batch)}
        degraded_N = torch.cat([self._log_probs(part, self._teacher_states(part)) for part in self._micro_batches(degraded)])
        # A row without an image looks the same under every view: it gets the same numbers, not a second rounding of them.
        pictured_R = torch.tensor(batch["num_images"], device=rollout_N.device) > 0
        degraded_N = torch.where(pictured_R[rollout_N], degraded_N, original_N)
        return states_RTG, advantage_for(self.args.weighting, original_N, degraded_N, deadband=self.args.deadband)

    def _micro_batches(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The batch in as many parts as the update has, rows in order."""
        parts = self.args.gradient_accumulation_steps if self.model.training else 1
        return (unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(split_pixel_values_by_grid(batch), parts))

    def _states(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """(R, T, H) of an unwrapped model, inside its wrapper's forward."""
        ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
        images = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        return self._get_last_hidden_state(model, ids, mask, inputs["completion_ids"].size(1), **images)

    def _teacher_states(self, inputs: dict[str, Any]) -> Tensor:
        """(R, T, G)."""
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        return self._forward_redirection(self.teacher_model, teacher, self._states, teacher, inputs)

    def _log_probs(self, inputs: dict[str, Any], states_RTG: Tensor) -> Tensor:
        """(N,) fp32 of the sampled tokens under the teacher, temperature 1."""
        mask_RT = inputs["completion_mask"].bool()
        head = head_of(self.accelerator.unwrap_model(self.teacher_model), len(self._tokenizer))
        return token_log_probs(states_RTG[mask_RT], head, inputs["completion_ids"][mask_RT])

    def _degraded_pixels(self, batch: dict[str, Any]) -> Tensor:
        """`pixel_values` of the same prompts with degraded images, from the call with which TRL makes the original ones."""
        prompts, images = self._pictured
        shown = iter(shown_sizes(self.processing_class, batch, sum(batch["num_images"])))
        degraded = [[_degrade(picture, self.args.degrade, next(shown)) for picture in row or []] or None for row in images or []]
        texts = [
            apply_chat_template({"prompt": prompt}, self.processing_class, **self.chat_template_kwargs)["prompt"] for prompt in prompts
        ]
        processed = self.processing_class(images=degraded, text=texts, padding=True, return_tensors="pt")
        original = batch["pixel_values"]
        if processed["pixel_values"].shape != original.shape:
            raise DataError(
                f"the degraded view's pixel_values are {tuple(processed['pixel_values'].shape)}, the original's {tuple(original.shape)}; "
                "both must be shown alike. Take a view that keeps the size of the images"
            )
        return processed["pixel_values"].to(original)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """As TRL's, which logs the mean over tokens of what `_compute_loss` returns second: here that is `kl`."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kl"].extend(metrics.pop("entropy"))
        return loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(`Σ c_t · KL_t / prompts` of this micro-batch (eq. 6), Σ KL_t, tokens); None as the divisor: every row is a prompt."""
        mask_RT = inputs["completion_mask"].bool()
        vocab_size, teacher = len(self._tokenizer), self.accelerator.unwrap_model(self.teacher_model)
        loss, kl_N = fused_weighted_divergence(
            self._states(unwrapped_student, inputs)[mask_RT],
            head_of(unwrapped_student, vocab_size),
            inputs["teacher_states"][mask_RT],
            head_of(teacher, vocab_size),
            inputs["coefficients"][mask_RT],
            normalizer=float(len(mask_RT) if num_items_in_batch is None else num_items_in_batch),
            divergence=self.args.divergence,
        )
        return loss, kl_N.sum(), mask_RT.sum()

    def _log_mean(self, name: str, values: Tensor) -> None:
        """The mean over all processes."""
        sums = torch.tensor([[float(values.sum()), float(len(values))]], device=self.accelerator.device)
        total, count = self.accelerator.gather(sums).sum(0).tolist()
        self._metrics["train" if self.model.training else "eval"][name].append(total / count)


def _parsed(kind: type[BaseModel], value: Any, key: str) -> Any:
    """A part of a recipe from its YAML form. Raises ConfigError."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{key}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _check_arguments(given: dict[str, Any]) -> None:
    if not isinstance(given.get("args"), VAOPDConfig):
        raise ConfigError(f"args must be a VAOPDConfig, which has the method's numbers, found {type(given.get('args')).__name__}")
    if given.get("teacher_model") is None:
        raise ConfigError("teacher_model is missing: the teacher scores every rollout twice, in this process. Give a model or its name")
    if given.get("tools"):
        raise ConfigError(
            "tools put text into a rollout that the student did not write, and images that have no second view. Leave them out"
        )
    if isinstance(given.get("train_dataset"), IterableDataset):
        raise ConfigError("train_dataset must be a Dataset: the rows of a stream can't be repeated k times. Load it whole")


def _groups(batch: dict[str, Any], k: int) -> Tensor:
    """(R,) the prompt of each row. Raises ConfigError where k neighbours don't have one prompt."""
    prompt_RP = batch["prompt_ids"]
    if len(prompt_RP) % k or (prompt_RP.reshape(-1, k, prompt_RP.size(1)) != prompt_RP[::k, None]).any():
        raise ConfigError(
            f"{k} neighbouring rows of a batch must be of one prompt, but are not. Leave sampler and dataloader settings to TRL"
        )
    return torch.arange(len(prompt_RP)) // k


def _degrade(picture: Any, degrade: Any, shown_size: tuple[int, int] | None) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise DataError(
            f"images must be PIL images, found {type(picture).__name__}. Cast the column: data.cast_column('image', datasets.Image())"
        )
    degraded: Image.Image = degrade(picture, shown_size=shown_size)
    if degraded.size != picture.size:
        raise DataError(f"the view made an image {degraded.size} from {picture.size}; a view must keep the size")
    return degraded
