"""The most memory that training takes at once, from configurations alone: the sum of what lies there in each phase of a step.

A step has four phases, and its peak is the largest of them. In all of them there are the student's weights, AdamW's two moments of what is
trained, and the teacher's weights unless they are offloaded.

| phase | beside them |
|---|---|
| rollouts | keys and values of every rollout that is decoded, buffers of the sampler |
| scoring | one forward of the teacher without a graph; its weights where they are offloaded, its states of all responses |
| training | gradients, the saved activations of one micro-batch, buffers of the loss and the head's gradient |
| update | gradients, and what AdamW needs beside them |

Activations are those that autograd keeps in transformers' Qwen3 decoder layer and vision block; the sum is held to a measured run on a CPU
(tests/preflight/test_memory.py). Other families are near enough to plan by.

Sizes are bytes of tensors. What an allocator leaves unused between them comes on top: glibc's on a CPU held 784 MiB for the test's 648,
and 956 for 526 with adapters. With MALLOC_MMAP_THRESHOLD_=262144 in the environment, as in the test, it holds none, and costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vaopd.config import RunConfig
from vaopd.core.head import default_chunk
from vaopd.models.families import family_of, vision_parameters
from vaopd.models.lora import add_adapters
from vaopd.models.shared_prompt import LEAST_RATIO
from vaopd.train.setup import READS_THE_IMAGE_ONCE

FP32, BF16 = 4, 2
SAMPLER = {True: 48, False: 28}  # bytes of the sampler per rollout and vocabulary entry, with top-p and without


@dataclass(frozen=True)
class Work:
    """What a step works on."""

    prompt: int  # P: tokens, image tokens included
    response: int  # T
    patches: int = 0  # of the images of one prompt, before merging


@dataclass(frozen=True)
class Model:
    """A model without its weights."""

    config: Any
    parameters: int
    trained: int  # of them, or of the adapters beside them
    vision: int  # parameters before the decoder
    largest: int  # elements of the largest tensor
    adapters: int = 0

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.text.num_attention_heads * self._head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.text.num_key_value_heads * self._head_dim

    @property
    def _head_dim(self) -> int:
        return getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    @property
    def decoder(self) -> int:
        """Parameters of the decoder's layers."""
        tables = 1 if getattr(self.config, "tie_word_embeddings", False) else 2
        return self.parameters - self.vision - tables * self.text.vocab_size * self.text.hidden_size


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and part."""

    phases: dict[str, dict[str, int]]  # phase -> part -> bytes

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def phase(self) -> str:
        """Of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


def measure(config: Any, recipe: RunConfig | None = None) -> Model:
    """Count a configuration's parameters on the meta device; with a recipe, those that it trains."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        whole = list(model.parameters())
        parameters, vision = (sum(p.numel() for p in found) for found in (whole, vision_parameters(model)))
        trained, adapters = parameters, 0
        if recipe is None:
            trained = 0
        elif recipe.lora:
            add_adapters(model, recipe.lora, seed=0)
            trained = adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        elif not recipe.optim.train_vision:
            trained -= vision
    return Model(config, parameters, trained, vision, max(p.numel() for p in whole), adapters)


def estimate(recipe: RunConfig, student: Model, teacher: Model | None, work: Work, *, gpu: bool, bf16: bool, processes: int = 1) -> Memory:
    """Of one process, on the device that trains (and, on a CPU, in its memory)."""
    computed = BF16 if bf16 else FP32
    frozen_student = bf16 and recipe.lora is not None
    prompts, k = -(-recipe.optim.prompts_per_step // processes), 1 if recipe.method.off_policy else recipe.rollouts.k
    offloaded = recipe.teacher_offload and gpu
    weights = {"student": (student.parameters) * (BF16 if frozen_student else FP32) + student.adapters * FP32}
    weights["optimiser"] = 2 * FP32 * student.trained
    # Autocast keeps a bf16 copy of each fp32 matrix that it multiplies with, for as long as the forward and backward last.
    casts = {"autocast copies": BF16 * student.trained} if bf16 and not frozen_student else {}
    teaching = {} if teacher is None or recipe.loss == "nll" else {"teacher": teacher.parameters * computed}
    resident = weights | ({} if offloaded else teaching)
    gradients = {"gradients": FP32 * student.trained}
    states = {"teacher's states": prompts * k * work.response * teacher.text.hidden_size * computed} if teaching and teacher else {}
    moments = FP32 * (student.trained if gpu else 2 * min(student.largest, student.trained))
    micro, single = micro_batch(recipe, student, work, prompts, k)
    phases = {
        "training": resident
        | states
        | casts
        | training(recipe, student, teacher, micro, computed, gpu=gpu)
        # A single micro-batch has its activations before it has gradients, of which the head's are the first. Recomputed ones live
        # beside the gradients of all layers after theirs.
        | ({} if single and not recipe.optim.checkpointing else gradients),
        "update": resident | states | gradients | {"AdamW's own": moments},
    }
    if not recipe.method.off_policy:
        decoded = min(max(1, recipe.rollouts.rows // k), prompts) * k
        phases["rollouts"] = resident | casts | rollouts(recipe, student, decoded, work, computed)
    if teaching and teacher:
        scored, _ = micro_batch(recipe, teacher, work, prompts, k)
        forward = forward_only(teacher, scored, computed) | {"head": log_prob_chunk(teacher)}
        phases["scoring"] = resident | teaching | states | forward
    return Memory(phases)


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: int  # through the decoder
    keys: int  # rows of keys and values that the split attention gathers beside them
    rows: int  # response tokens
    patches: int


def shares(recipe: RunConfig, model: Model, work: Work, k: int) -> bool:
    """Whether siblings will share their prompt: what `vaopd.models.shared_prompt.Auto` decides for answers of one length."""
    ratio = k * (work.prompt + work.response) / (work.prompt + k * work.response)
    return recipe.forward == "auto" and family_of(model.config).not_shared is None and ratio >= LEAST_RATIO


def micro_batch(recipe: RunConfig, model: Model, work: Work, prompts: int, k: int) -> tuple[Batch, bool]:
    """The largest, and whether it is the only one of a step."""
    row = work.prompt + work.response
    packed = work.prompt + k * work.response
    shared = shares(recipe, model, work, k)
    group = packed if shared else k * row
    limit, whole = recipe.optim.tokens_per_forward, prompts * group
    tokens = max(min(whole, limit), row)
    share = tokens / group  # groups of the micro-batch
    keys = int(share * (work.prompt + k * row)) if shared else 0
    images = max(1, -(-tokens // group)) if work.patches else 0
    return Batch(tokens, keys, min(int(share * k * work.response), tokens), images * work.patches), whole <= limit


def training(recipe: RunConfig, student: Model, teacher: Model | None, batch: Batch, computed: int, *, gpu: bool) -> dict[str, int]:
    """What the student's forward leaves for its backward, and the loss."""
    vision_is_trained = student.trained == student.parameters or bool(recipe.lora and recipe.lora.vision)
    layers, per_layer = student.text.num_hidden_layers, layer_activations(student, batch, computed)
    kept, blocks = layers * per_layer, vision_activations(student, batch, computed) if vision_is_trained else 0
    if recipe.optim.checkpointing:  # of each layer its input, and one layer whole
        kept = layers * batch.tokens * student.text.hidden_size * FP32 + per_layer
        blocks //= 8
    vocab, hidden = student.text.vocab_size, student.text.hidden_size
    device = torch.device("cuda" if gpu else "cpu")
    chunk = min(default_chunk(vocab, device), batch.rows)
    trains_head = recipe.lora is None
    loss = 3 * chunk * vocab * FP32 + batch.rows * hidden * FP32
    loss += vocab * hidden * FP32 * trains_head
    if computed == BF16 and teacher is not None:  # both heads in fp32, unless both are bf16 already
        loss += vocab * teacher.text.hidden_size * FP32 if trains_head else 0
    return {"activations": kept + blocks, "loss": loss}


def layer_activations(model: Model, batch: Batch, computed: int) -> int:
    """Saved by one decoder layer: two norms, the projections, the attention, the gated MLP."""
    text, queries = model.text, model.queries
    # A norm keeps its input, the normalised one where its weight is trained, and its output as the next product reads it.
    kept = 1 if model.adapters else 2
    norms = 2 * text.hidden_size * (kept * FP32 + computed)
    # Queries and keys have norms of their own; then rotated queries, the attention's output, and that in the order of the row.
    attention = kept * (queries + model.keys) * FP32 + 3 * queries * computed
    mlp = 4 * text.intermediate_size * computed
    # Keys and values as the attention reads them: once for every query head, and of a shared prompt once for every sibling.
    seen = (batch.keys or batch.tokens) * 2 * queries * computed
    return batch.tokens * (norms + attention + mlp) + seen


def vision_activations(model: Model, batch: Batch, computed: int) -> int:
    """Saved by all blocks of the vision tower."""
    vision = model.config.vision_config
    width = getattr(vision, "hidden_size", None) or vision.embed_dim
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    inner = getattr(vision, "intermediate_size", 4 * width)
    return depth * batch.patches * (width * (2 * FP32 + 10 * computed) + 2 * inner * computed)


def forward_only(model: Model, batch: Batch, computed: int) -> dict[str, int]:
    """The largest layer of a forward that keeps no graph."""
    text = model.text
    width = max(text.hidden_size, model.queries)
    layer = batch.tokens * (4 * width + 3 * text.intermediate_size) * computed
    return {"forward": layer + batch.keys * 2 * width * computed}


def log_prob_chunk(model: Model) -> int:
    """A chunk of log-probabilities."""
    vocab = model.text.vocab_size
    return 3 * default_chunk(vocab, torch.device("cpu")) * vocab * FP32


def rollouts(recipe: RunConfig, student: Model, rows: int, work: Work, computed: int) -> dict[str, int]:
    """Keys and values of the rollouts side by side, and the sampler's buffers."""
    text = student.text
    # Norms and rotations leave keys in fp32 where the weights are; values come from their product as it is computed.
    token = student.keys * (computed + (BF16 if computed == BF16 and recipe.lora else FP32))
    cache = rows * (work.prompt + work.response) * token * (text.num_hidden_layers + 1)  # one layer is copied as it grows
    return {"keys and values": cache, "sampler": rows * text.vocab_size * SAMPLER[recipe.rollouts.top_p < 1]}


def reads_twice(recipe: RunConfig) -> bool:
    """Whether the teacher scores the degraded view too."""
    return recipe.method.name not in READS_THE_IMAGE_ONCE
