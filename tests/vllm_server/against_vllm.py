"""The engine and a whole run against a real vLLM server: `make test-vllm`. Prints what docs/vllm.md reports with `-s`."""

from __future__ import annotations

import copy
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from torch import Tensor
from widen import widen

from vaopd.config import load_config
from vaopd.core import token_log_probs
from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.models.forward import head_of, rows
from vaopd.models.load import Source, control_ids, load_model, open_source, save_model
from vaopd.rollouts.hf import Sampling
from vaopd.rollouts.vllm import VLLMEngine
from vaopd.rollouts.vllm_server import Server
from vaopd.rollouts.vllm_wire import read_answer, request
from vaopd.train.folder import read_rows
from vaopd.types import ORIGINAL, Example, Group, Prompt
from vaopd.world.questions import sample_figure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv/vllm"
STEPS = 25
STARTED = 400  # seconds until the server has to be up


@dataclass
class Served:
    """A running server and what it was started for."""

    url: str
    student: Path
    recipe: Path  # of a run with it
    source: Source
    model: Any  # never changed: take a copy

    def engine(self, folder: Path, model: Any, **sampling: Any) -> VLLMEngine:
        settings = Sampling(**{"max_tokens": 48, "seed": 5, **sampling})
        return VLLMEngine(model, self.source, settings, url=self.url, run=folder)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def vaopd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vaopd", *arguments], capture_output=True, text=True, check=False, timeout=900)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server, started by the line that `vaopd train` prints when there is none."""
    folder = tmp_path_factory.mktemp("vllm")
    base = open_source("builtin:student")
    student = moved(widen(load_model(base, dtype=torch.float32)), 0.15)  # worse than it was, so that a few steps show
    save_model(student, base.processor, folder / "student")
    assert vaopd("world", str(folder / "world"), "--set", "train=256", "--set", "eval=32", "--set", "test=32").returncode == 0
    url, recipe = f"http://127.0.0.1:{free_port()}", folder / "recipe.yaml"
    values = {
        "run": str(folder / "run"),
        "method": "va_opd",
        "student": str(folder / "student"),
        "teacher": "builtin:teacher-m",
        "data": {name: str(folder / "world" / f"{name}.parquet") for name in ("train", "eval", "test")},
        "rollouts": {"k": 4, "max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "engine": "vllm", "url": url},
        "optim": {"lr": 1e-4, "prompts_per_step": 8, "steps": STEPS, "warmup": 0.2, "weight_decay": 0.01},
        "eval": {"every": STEPS, "k": 2, "baselines": False},
        "precision": "fp32",
        "trackers": [],
    }
    recipe.write_text(yaml.safe_dump(values))
    refused = vaopd("train", str(recipe))
    assert refused.returncode == 8, refused.stderr
    source = open_source(str(folder / "student"))
    process = start(refused.stderr.splitlines()[-1], folder / "server.log")
    try:
        wait(process, url, folder / "server.log")
        yield Served(url, folder / "student", recipe, source, load_model(source, dtype=torch.float32))
    finally:
        stop(process)


def start(line: str, log: Path) -> subprocess.Popen[bytes]:
    """Run the printed command line with the settings of a small CPU server beside it."""
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words[: words.index("vllm")])
    environment = {
        **{key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR")},
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE / "shim"),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_HOST_IP": "127.0.0.1",  # its processes talk over the loopback, too
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    # Without a minute of compilation; and a seeded request whose prompt is read in parts ends a CPU server (docs/vllm.md).
    command = [*words[words.index("vllm") :], "--enforce-eager", "--no-enable-chunked-prefill"]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes that it started, which are one group."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)


def wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTED:
        if process.poll() is not None:
            break
        try:
            if httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                print(f"\nserver up after {time.monotonic() - began:.0f} s")
                return
        except httpx2.HTTPError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def asked(served: Served) -> list[Prompt]:
    """One image, two, none, and text that looks like a placeholder and an end."""
    pictures = [sample_figure(random.Random(seed)) for seed in range(4)]
    images = [png_bytes(picture.image) for picture in pictures]
    render = Renderer(served.source.processor)
    examples = [Example(f"q{i}", (image,), picture.problem) for i, (image, picture) in enumerate(zip(images, pictures, strict=True))]
    examples += [Example("two", (images[0], images[1]), "<image> and <image> Which is longer?"), Example("text", (), "How long is it?")]
    examples.append(Example("control", (images[2],), "<image>How long is <|image_pad|> or <|im_end|>?"))
    return [render(example) for example in examples]


def gap(model: Any, groups: Sequence[Group]) -> Tensor:
    """(N,) |Δ log p(y_t)| between the server and this model."""
    with torch.no_grad():
        head = head_of(model, model.get_output_embeddings().weight.shape[0])
        own_N = token_log_probs(rows(model, groups, ORIGINAL), head, torch.cat([group.ids_N for group in groups]))
    return (torch.cat([group.served_logp_N for group in groups if group.served_logp_N is not None]) - own_N).abs()


def ids(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[response.tolist() for response in group.responses] for group in groups]


def moved(model: Any, share: float) -> Any:
    """A copy in which every number is another one, by this share of it."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
    return copied


def test_the_wide_student_is_the_built_in_one(served: Served, asked: list[Prompt]) -> None:
    """What is served differs from the package's student in nothing but its weights' noise."""
    built_in = load_model(open_source("builtin:student"), dtype=torch.float32)
    groups = [Group(prompt, (torch.arange(300, 310),), (False,)) for prompt in asked]
    with torch.no_grad():
        difference = rows(widen(built_in), groups, ORIGINAL) - rows(built_in, groups, ORIGINAL)
    assert float(difference.abs().max()) < 1e-3
    assert float(difference.abs().mean()) < 1e-4


def test_log_probabilities_and_seeds(served: Served, asked: list[Prompt], tmp_path: Path) -> None:
    engine = served.engine(tmp_path, served.model)
    groups = engine.generate(asked, 4, 1)
    found = gap(served.model, groups)
    print(f"\ngap: at most {float(found.max()):.1e}, mean {float(found.mean()):.1e} over {len(found)} tokens")
    assert float(found.max()) < 1e-4
    assert ids(engine.generate(asked, 4, 1)) == ids(groups)
    assert ids(engine.generate(asked, 4, 2)) != ids(groups)
    assert all(len({tuple(response) for response in responses}) > 1 for responses in ids(groups)), "siblings have seeds of their own"
    single = request(asked[0], 1, 1, engine.rules)
    single["sampling_params"]["seed"] += 2
    version = json.loads(engine.server.ask("GET", "/weight_info"))["weight_version"]
    third = read_answer(engine.server.ask("POST", "/inference/v1/generate", single), asked[0], 1, engine.rules, version)
    assert ids([third])[0][0] == ids(groups)[0][2], "sibling i has the seed plus i"


def test_what_may_be_sampled(served: Served, asked: list[Prompt], tmp_path: Path) -> None:
    """Logits so small that all ids are about equally likely: none of the control ids comes, which do without the rule."""
    flat = copy.deepcopy(served.model)
    with torch.no_grad():
        flat.model.language_model.norm.weight.mul_(0.02)
    engine, control = served.engine(tmp_path, flat), control_ids(served.source)
    sampled = torch.cat([group.ids_N for group in engine.generate(asked, 16, 1)])
    assert len(sampled) > 2000
    assert control.isdisjoint(sampled.tolist())
    assert int(sampled.max()) < served.source.vocab_size
    free = replace(engine.rules, forbidden_ids=frozenset())
    body = request(asked[0], 64, 1, free)
    answer = json.loads(engine.server.ask("POST", "/inference/v1/generate", body))
    assert any(control.intersection(choice["token_ids"]) for choice in answer["choices"])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (1.5, 0.5)])
def test_the_distribution_is_hfs(served: Served, asked: list[Prompt], tmp_path: Path, temperature: float, top_p: float) -> None:
    """First tokens against the student's own probabilities: chi-square below its 99.9 % quantile, nothing outside the nucleus."""
    engine = served.engine(tmp_path, served.model, temperature=temperature, top_p=top_p, max_tokens=1)
    groups = [group for step in range(12) for group in engine.generate(asked[:1], 64, step)]
    drawn = torch.cat([group.ids_N for group in groups])
    with torch.no_grad():
        head = head_of(served.model, served.source.vocab_size)
        logits_V = head.logits(rows(served.model, [Group(asked[0], (torch.tensor([300]),), (False,))], ORIGINAL))[0] / temperature
    logits_V[sorted(control_ids(served.source))] = -torch.inf
    p_V, order = logits_V.double().softmax(0).sort(descending=True)
    kept = p_V.cumsum(0) - p_V < top_p if top_p < 1 else torch.ones_like(p_V, dtype=torch.bool)
    p_V = torch.where(kept, p_V, 0.0) / p_V[kept].sum()
    counts = torch.bincount(drawn, minlength=len(p_V))[order].double()
    assert int(counts[p_V == 0].sum()) == 0, "outside the nucleus"
    expected = p_V * len(drawn)
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3 if freedom else 1e-9  # Wilson-Hilferty
    assert statistic <= quantile, (statistic, freedom)


def test_the_sync_matters(served: Served, asked: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor moved: stale weights are far above the bar, loaded ones where they were; the vision tower's cache is forgotten too."""
    engine = served.engine(tmp_path, served.model)
    engine.generate(asked, 4, 1)
    engine.model = moved(served.model, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(Server, "load", lambda self, folder, version: self.ask("POST", "/update_weight_version", {"new_version": version}))
        stale = gap(engine.model, engine.generate(asked, 4, 1))
    fresh = gap(engine.model, engine.generate(asked, 4, 1))
    print(f"\nratio {float(stale.mean().exp()):.3f} without the sync, 1 + {float(fresh.mean().exp()) - 1:.0e} with it")
    assert float(stale.mean().exp()) > 1.05
    assert float(fresh.max()) < 1e-4


def test_a_run(served: Served, tmp_path: Path) -> None:
    """`vaopd train` on the built-in world: the gap of every step, and what it learns beside the same recipe with the engine hf."""
    config = load_config(served.recipe)
    done = vaopd("train", str(served.recipe))
    assert done.returncode == 0, done.stderr
    assert "is not the model that is trained" not in done.stderr
    other = vaopd("train", str(served.recipe), "--set", "rollouts.engine=hf", "--set", f"run={tmp_path / 'hf'}")
    assert other.returncode == 0, other.stderr
    ours, hf = ([row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"] for run in (config.run, tmp_path / "hf"))
    assert len(ours) == len(hf) == STEPS
    most = max(row["sampler_gap_max"] for row in ours)
    print(f"\nlargest gap of {STEPS} steps {most:.1e}, ratio at most 1 + {max(row['sampler_ratio'] for row in ours) - 1:.0e}")
    assert most < 1e-3
    assert all(1 <= row["sampler_ratio"] < 1 + 1e-3 for row in ours)
    assert all("sampler_gap" not in row for row in hf)

    kl = {run: [row["kl"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"] for run in (config.run, tmp_path / "hf")}
    print(f"held-out kl {kl[config.run][0]:.3f} -> {kl[config.run][-1]:.3f}, hf {kl[tmp_path / 'hf'][-1]:.3f}")
    assert kl[config.run][0] == kl[tmp_path / "hf"][0]
    assert kl[config.run][-1] < 0.7 * kl[config.run][0]
    assert abs(kl[config.run][-1] / kl[tmp_path / "hf"][-1] - 1) < 0.25
