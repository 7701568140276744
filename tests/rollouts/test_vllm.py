"""The engine that asks a vLLM server, against a small server with vLLM's request and answer formats (tests/rollouts/fake_vllm.py)."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, decoded, serving
from safetensors import safe_open

from small_pair import Pair
from vaopd.config import RunConfig, parse_config
from vaopd.core import Head, token_log_probs
from vaopd.errors import ConfigError, EngineError
from vaopd.models.forward import rows
from vaopd.models.load import control_ids
from vaopd.rollouts import vllm_server
from vaopd.rollouts.hf import HFEngine, Sampling, rollout_seed
from vaopd.rollouts.vllm import VLLMEngine, check_vllm
from vaopd.rollouts.vllm_server import Server
from vaopd.rollouts.vllm_wire import forbidden_ids, pack, quoted, request
from vaopd.train.folder import read_rows
from vaopd.train.health import gap_warning
from vaopd.train.loop import train
from vaopd.train.metrics import gap_metrics
from vaopd.types import ORIGINAL, Group, Prompt

SAMPLING = Sampling(max_tokens=8, temperature=0.7, top_p=0.95, seed=3)


@pytest.fixture
def fake(pair: Pair) -> FakeVLLM:
    """A server that starts with weights of its own, which the engine has to replace."""
    model = pair.fresh()
    with torch.no_grad():
        model.model.language_model.norm.weight.neg_()
    return FakeVLLM(untied(model), pair.vocab_size)


def untied(model: Any) -> Any:
    """As the served folder is: the LM head a tensor of its own."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


@pytest.fixture
def url(fake: FakeVLLM) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def engine(pair: Pair, url: str, tmp_path: Path) -> VLLMEngine:
    return VLLMEngine(pair.fresh(), pair.source, SAMPLING, url=url, run=tmp_path / "run")


def failure(engine: VLLMEngine, prompts: list[Prompt], k: int = 2) -> str:
    with pytest.raises(EngineError) as caught:
        engine.generate(prompts, k, 1)
    return str(caught.value)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_ids_and_pixels_arrive_as_they_are(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt]) -> None:
    groups = engine.generate(prompts, 3, 1)
    assert [group.prompt for group in groups] == prompts
    assert len(fake.requests()) == len(prompts)
    for prompt in prompts:
        (body,) = [body for body in fake.requests() if body == request(prompt, 3, 1, engine.rules)]
        assert body["token_ids"] == prompt.ids_P.tolist()
        shown = decoded(body.get("features"))
        assert shown.keys() == ({ORIGINAL} if prompt.images else set())
        for name, tensor in prompt.images.get(ORIGINAL, {}).items():
            assert shown[ORIGINAL][name].dtype == tensor.dtype
            assert torch.equal(shown[ORIGINAL][name], tensor), (prompt.id, name)


def test_placeholders_are_named_where_they_stand(engine: VLLMEngine, prompts: list[Prompt], pair: Pair) -> None:
    image = pair.student.config.image_token_id
    for prompt in prompts:
        body = request(prompt, 1, 0, engine.rules)
        places = body["features"]["mm_placeholders"]["image"] if prompt.images else []
        covered = sorted(place["offset"] + i for place in places for i in range(place["length"]))
        assert covered == (prompt.ids_P == image).nonzero()[:, 0].tolist()
        assert len(places) == len(prompt.images.get(ORIGINAL, {}).get("image_grid_thw", []))


def test_equal_images_have_one_name_and_others_another(engine: VLLMEngine, prompts: list[Prompt]) -> None:
    """The server keeps the vision tower's output under it."""
    square, wide, two, _, other = prompts
    names = [name for p in (square, wide, two, other) for name in request(p, 1, 0, engine.rules)["features"]["mm_hashes"]["image"]]
    assert len(set(names)) == 5
    pixels = {name: tensor.clone() for name, tensor in square.images[ORIGINAL].items()}
    again = request(Prompt("again", square.ids_P, {ORIGINAL: pixels}), 1, 0, engine.rules)["features"]
    assert again["mm_hashes"]["image"] == names[:1]
    pixels["pixel_values"][0, 0] += 1e-3
    assert request(Prompt("again", square.ids_P, {ORIGINAL: pixels}), 1, 0, engine.rules)["features"]["mm_hashes"]["image"] != names[:1]


def test_the_distribution_is_hfs(engine: VLLMEngine, pair: Pair, prompts: list[Prompt]) -> None:
    """Temperature, top-p, length and ends as given, and the same ids left out: of those that hf can draw, none more, none fewer."""
    wanted = request(prompts[0], 4, 1, engine.rules)["sampling_params"]
    assert {key: wanted[key] for key in ("n", "temperature", "top_p", "max_tokens")} == {
        "n": 4, "temperature": 0.7, "top_p": 0.95, "max_tokens": 8,
    }  # fmt: skip
    assert (wanted["stop_token_ids"], wanted["ignore_eos"]) == (sorted(pair.source.eos_ids), True)
    hf = HFEngine(pair.student, SAMPLING, vocab_size=pair.vocab_size, eos_ids=pair.source.eos_ids, forbidden_ids=control_ids(pair.source))
    head_rows = pair.student.get_output_embeddings().weight.shape[0]
    allowed = [index for index in range(head_rows) if str(index) not in wanted["logit_bias"]]
    assert allowed == (~hf.forbidden_V).nonzero()[:, 0].tolist()
    assert torch.tensor([50.0, 20.0 + wanted["logit_bias"]["0"]]).softmax(0).tolist() == [1.0, 0.0], "exactly nothing, in fp32"


def test_rows_that_pad_the_head_are_left_out_too() -> None:
    assert forbidden_ids({2, 5}, 10, 13) == {2, 5, 10, 11, 12}
    assert forbidden_ids({2}, 10, 10) == {2}
    with pytest.raises(EngineError, match=r"1025 ids must not be sampled.*1024 rows that pad.*engine: hf"):
        forbidden_ids({2}, 10, 1034)


def test_seed_step_and_prompt_decide_the_seed(pair: Pair, engine: VLLMEngine, prompts: list[Prompt], tmp_path: Path, url: str) -> None:
    other = VLLMEngine(engine.model, pair.source, Sampling(8, seed=4), url=url, run=tmp_path)

    def seed(prompt: Prompt, step: int, of: VLLMEngine = engine) -> int:
        return int(request(prompt, 4, step, of.rules)["sampling_params"]["seed"])

    assert seed(prompts[0], 1) == seed(prompts[0], 1) == rollout_seed(3, 1, prompts[0].id, 0) // 2
    assert len({seed(prompts[0], 1), seed(prompts[0], 2), seed(prompts[1], 1), seed(prompts[0], 1, other)}) == 4
    assert all(0 <= seed(prompt, step) < 2**62 for prompt in prompts for step in range(50))


def test_msgpack_by_the_specification() -> None:
    """https://github.com/msgpack/msgpack/blob/master/spec.md, in its longest forms; tensors as vLLM's extension 3."""
    assert pack({"a": [1, True]}) == bytes.fromhex("df00000001 db0000000161 dd00000002 d30000000000000001 c3".replace(" ", ""))
    assert pack([False, -1, b"\x07\x08"]) == bytes.fromhex("dd00000003 c2 d3ffffffffffffffff c900000002030708".replace(" ", ""))
    with pytest.raises(TypeError):
        pack(1.5)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_answers_become_groups(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt], pair: Pair) -> None:
    sent: list[dict[str, Any]] = []

    def record(answer: dict[str, Any]) -> None:
        sent.append(copy.deepcopy(answer))
        answer["choices"].reverse()

    fake.change = record
    groups = [group for prompt in prompts for group in engine.generate([prompt], 4, 1)]
    for answer, group in zip(sent, groups, strict=True):
        assert [ids.tolist() for ids in group.responses] == [choice["token_ids"] for choice in answer["choices"]], "by index"
        assert group.ended_K == tuple(choice["finish_reason"] == "stop" for choice in answer["choices"])
        assert group.served_logp_N is not None
        assert group.served_logp_N.dtype == torch.float32
        assert group.sampler_logp_N is None
        for ids, ended in zip(group.responses, group.ended_K, strict=True):
            found = [place for place, token in enumerate(ids.tolist()) if token in pair.source.eos_ids]
            assert found == ([len(ids) - 1] if ended else []), "the first end is part of the response, and nothing after it"
    assert {ended for group in groups for ended in group.ended_K} == {True, False}, "the models must show both"


def test_the_stated_log_probabilities_are_the_trainers(engine: VLLMEngine, prompts: list[Prompt], pair: Pair) -> None:
    """After the sync, at temperature 1 and over the whole head, whatever the sampling."""
    groups = engine.generate(prompts, 3, 1)
    with torch.no_grad():
        head = Head(pair.student.get_output_embeddings().weight)
        own_N = token_log_probs(rows(pair.student, groups, ORIGINAL), head, torch.cat([group.ids_N for group in groups]))
    served_N = torch.cat([group.served_logp_N for group in groups if group.served_logp_N is not None])
    assert float((served_N - own_N).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["prompt_token_ids"].insert(5, 3), r"example 'square': the server answered another prompt: \d+ tokens, not \d+"),
        (lambda a: a.update(prompt_token_ids=[]), "0 image placeholders, not"),
        (lambda a: a["mm_placeholders"]["image"][0].update(offset=0), "put images to .*'offset': 0.* but they stand at"),
        (lambda a: a.update(mm_placeholders=None), r"put images to \[\]"),
        (lambda a: a["choices"].pop(), "2 answers were asked for, the server gave 1"),
        (lambda a: a["choices"][1].update(index=0), "2 answers were asked for"),
        (lambda a: a["choices"][1].update(token_ids=[]), "answer 1: 0 tokens of at most 8"),
        (lambda a: a["choices"][1]["logprobs"]["content"].pop(), "not a log-probability for each"),
        (lambda a: a["choices"][1]["logprobs"]["content"][0].update(token_id=1), "not a log-probability for each"),
        (lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=0.5), "not a log-probability for each"),
        (lambda a: a["choices"][0].update(logprobs=None), "can't be read: \"choices.0.logprobs\""),
        (lambda a: a.pop("choices"), "can't be read: \"choices\""),
        (lambda a: a["choices"][0].update(finish_reason="abort"), 'ended it for "abort"'),
        (lambda a: a["choices"][0].update(weight_versions=[{"version": "default"}]), 'from weights "default", not .*another run'),
    ],
)  # fmt: skip
def test_an_answer_to_something_else_stops_the_run(
    engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    fake.change = change
    with pytest.raises(EngineError, match=message) as caught:
        engine.generate(prompts[:1], 2, 1)
    assert "example 'square'" in str(caught.value)


def first_answer(answer: dict[str, Any], ids: list[int], reason: str) -> None:
    entries = [{"token_id": index, "logprob": -1.0} for index in ids]
    answer["choices"][0].update(token_ids=ids, finish_reason=reason, logprobs={"content": entries})


@pytest.mark.parametrize(
    ("ids", "reason", "message"),
    [
        ([300] * 8, "stop", 'ended it for "stop"'),
        ([300, 301, 200], "length", 'ended it for "length"'),
        ([300, 301], "length", "cut at 2 of 8 tokens.*larger --max-model-len"),
        ([300] * 9, "length", "9 tokens of at most 8"),
        ([200, 301, 200], "stop", "an end of the response before the last one"),
        ([300, 0, 300, 300, 300, 300, 300, 300], "length", r"control ids \[0\]"),
        ([300, -1, 300, 300, 300, 300, 300, 300], "length", r"control ids \[-1\]"),
        ([300, 10**6, 300, 300, 300, 300, 300, 300], "length", r"\[1000000\], or ids beyond the LM head"),
    ],
)
def test_ends_lengths_and_control_ids_are_checked(
    engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt], pair: Pair, ids: list[int], reason: str, message: str
) -> None:
    assert 200 in pair.source.eos_ids
    assert 0 in control_ids(pair.source)
    fake.change = lambda answer: first_answer(answer, ids, reason)
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts[:1], 2, 1)


@pytest.mark.parametrize(
    ("ids", "reason", "ended"), [([300, 200], "stop", True), ([300] * 8, "length", False), ([300] * 7 + [200], "stop", True)]
)
def test_whole_answers_pass_them(
    engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt], ids: list[int], reason: str, ended: bool
) -> None:
    fake.change = lambda answer: first_answer(answer, ids, reason)
    (group,) = engine.generate(prompts[:1], 2, 1)
    assert (group.responses[0].tolist(), group.ended_K[0]) == (ids, ended)


def test_a_prompt_too_long_for_the_server_is_no_short_answer(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt]) -> None:
    fake.max_model_len = len(prompts[3].ids_P) + 3
    with pytest.raises(EngineError, match="cut at 3 of 8 tokens"):
        engine.generate(prompts[3:4], 8, 1)


# --- the server's weights ---------------------------------------------------------------------------------------------


def test_weights_are_handed_over_before_every_round(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt]) -> None:
    for round_ in range(2):
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.add_(0.01)
        fake.asked.clear()
        engine.generate(prompts, 2, round_)
        assert fake.paths[:5] == [
            "/collective_rpc", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/update_weight_version",
        ]  # fmt: skip
        assert fake.paths[5:] == ["/inference/v1/generate"] * len(prompts)
        theirs = fake.model.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in engine.model.state_dict().items())


def test_the_served_folder(pair: Pair, tmp_path: Path) -> None:
    """A whole Hugging Face folder whose LM head is a tensor of its own, in the precision of the computation; nothing unfinished stays."""
    for name in ("float32", "bfloat16"):
        run = tmp_path / name
        vllm_server.write_served(pair.student, pair.source.processor, run / "served", getattr(torch, name))
        config = json.loads((run / "served" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert config["dtype"] == config["text_config"]["dtype"] == name
        assert not config["text_config"].get("tie_word_embeddings", False)
        with safe_open(run / "served" / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(pair.student.state_dict())
            assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {f"torch.{name}"}  # noqa: SIM118 - not a dictionary
        assert (run / "served" / "tokenizer.json").exists()
        assert [path.name for path in run.iterdir()] == ["served"]


def test_a_busy_server_is_refused(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt]) -> None:
    fake.busy = True
    assert "still answering somebody else" in failure(engine, prompts)


# --- the server itself ------------------------------------------------------------------------------------------------


def test_without_a_server_the_message_has_the_line_that_starts_one(pair: Pair, tmp_path: Path) -> None:
    with serving(FakeVLLM(None, 0)) as gone:
        pass
    with pytest.raises(EngineError) as caught:
        VLLMEngine(pair.student, pair.source, SAMPLING, url=gone, run=tmp_path / "my run")  # a space, as a shell takes it
    port = gone.rpartition(":")[2]
    assert str(caught.value).splitlines()[-1].strip() == (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve '{tmp_path}/my run/served' --host 127.0.0.1 --port {port} --dtype float32 --max-model-len "
        f"{8 + 4096 if (limit := pair.source.config.text_config.max_position_embeddings) > 4104 else limit} --enable-scale-out "
        "--no-mm-device-do-normalize"
    )
    assert (tmp_path / "my run" / "served" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        ({"version": "0.31.2"}, 'is vLLM "0.31.2"; this is written for 0.32.x'),
        ({"version": "\x1b[31m"}, r"is vLLM \"\\u001b\[31m\""),
        ({"status": {"/version": (302, "")}}, "answered /version with 302"),
        ({"status": {"/version": (200, "[1")}}, "no JSON object"),
        ({"status": {"/version": (200, "[" * 100_000)}}, "no JSON object"),
        ({"status": {"/server_info?config_format=json": (404, "")}}, "Start it with VLLM_SERVER_DEV_MODE=1"),
        ({"settings": {}}, "Start it with VLLM_SERVER_DEV_MODE=1"),
        ({"normalises": True}, "must be started with --no-mm-device-do-normalize:"),
        ({"settings": {"dtype": "torch.bfloat16", "logprobs_mode": "processed_logprobs"}}, "--dtype float32 --logprobs-mode raw_logprobs:"),
    ],
)
def test_a_server_set_up_otherwise_is_refused(
    fake: FakeVLLM, url: str, pair: Pair, tmp_path: Path, set_up: dict[str, Any], message: str
) -> None:
    for key, value in set_up.items():
        setattr(fake, key, value)
    with pytest.raises(EngineError, match=message):
        VLLMEngine(pair.student, pair.source, SAMPLING, url=url, run=tmp_path)


def test_bf16_is_the_servers_too(fake: FakeVLLM, url: str, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="--dtype bfloat16"):
        VLLMEngine(pair.student, pair.source, Sampling(8, bf16=True), url=url, run=tmp_path)
    fake.settings["dtype"] = "torch.bfloat16"
    VLLMEngine(pair.student, pair.source, Sampling(8, bf16=True), url=url, run=tmp_path)


@pytest.mark.parametrize(
    ("path", "status", "text", "message"),
    [
        ("/inference/v1/generate", 403, "Restart vllm serve with --enable-scale-out", "generate with 403: .*--enable-scale-out"),
        ("/inference/v1/generate", 500, "EngineCore encountered an issue", "with 500"),
        ("/inference/v1/generate", 307, "", "with 307"),
        ("/inference/v1/generate", 200, "[1, 2]", "can't be read"),
        ("/inference/v1/generate", 200, "no json", "can't be read"),
        ("/inference/v1/generate", 200, "", "can't be read"),
        ("/collective_rpc", 404, '{"detail": "Not Found"}', "answered /collective_rpc with 404"),
        ("/reset_prefix_cache", 200, "{}", "keeps its prefix cache"),
        ("/update_weight_version", 500, "", "with 500"),
    ],
)  # fmt: skip
def test_refusals_of_the_server_are_told(
    engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt], path: str, status: int, text: str, message: str
) -> None:
    fake.status[path] = (status, text)
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts[:1], 2, 1)


def test_a_server_that_does_not_answer(
    fake: FakeVLLM, url: str, pair: Pair, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "PATIENCE", 2.0)
    engine = VLLMEngine(pair.student, pair.source, SAMPLING, url=url, run=tmp_path)
    fake.delay = 4.0
    with pytest.raises(EngineError, match=r"did not answer /collective_rpc within 2 s"):
        engine.generate(prompts[:1], 2, 1)


def test_hostile_texts_are_short_and_harmless(engine: VLLMEngine, fake: FakeVLLM, prompts: list[Prompt]) -> None:
    fake.status["/inference/v1/generate"] = (500, "\x1b[2J\x07\u202e\n[bold]" + "x" * 100_000)
    message = failure(engine, prompts[:1])
    assert message.isprintable()
    assert len(message) < 700
    fake.status.clear()
    fake.change = lambda answer: answer["choices"][0].update(finish_reason="\x1b]0;title\x07" * 1000)
    message = failure(engine, prompts[:1])
    assert message.isprintable()
    assert len(message) < 700
    assert quoted("a\nb") == '"a\\nb"'


def test_a_proxy_of_the_environment_is_not_asked(fake: FakeVLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(url).alive()


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org:8000",
        "http://10.0.0.1:8000",
        "http://0.0.0.0:8000",
        "https://127.0.0.1:8000",
        "http://me:secret@127.0.0.1:8000",
        "http://127.0.0.1@example.org",
        "http://127.0.0.1.example.org",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:x",
        "file:///etc/passwd",
        "",
    ],
)
def test_only_a_server_on_this_machine(recipe: Callable[..., RunConfig], address: str) -> None:
    with pytest.raises(ConfigError, match=r"must be http://127\.0\.0\.1:PORT") as caught:
        recipe(rollouts={"engine": "vllm", "url": address})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:8000/"])
def test_a_server_on_this_machine(recipe: Callable[..., RunConfig], address: str) -> None:
    assert recipe(rollouts={"engine": "vllm", "url": address}).rollouts.url == address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}}, "given whole weights, not adapters"),
        ({"method": "sft"}, "samples nothing"),
        ({"rollouts": {"engine": "vllm", "temperature": 0.005}}, "from 0.01 to 2.0, found 0.005"),
        ({"rollouts": {"engine": "vllm", "temperature": 2.5}}, "from 0.01 to 2.0, found 2.5"),
        ({"rollouts": {"engine": "vlm"}}, "rollouts.engine"),
    ],
)
def test_what_is_not_supported_is_refused(recipe: Callable[..., RunConfig], changes: dict[str, Any], message: str) -> None:
    values = recipe(rollouts={"engine": "vllm"}).model_dump(mode="json", exclude_none=True)
    with pytest.raises(ConfigError, match=message):
        parse_config(values | changes)


def test_other_families_and_several_processes_are_refused(
    recipe: Callable[..., RunConfig], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(rollouts={"engine": "vllm"})
    check_vllm(config, pair.source)
    settings = copy.deepcopy(pair.source.config)
    settings.model_type = "gemma3"
    with pytest.raises(ConfigError, match=r"written for qwen2_5_vl.*of type 'gemma3'.*engine: hf"):
        check_vllm(config, replace(pair.source, config=settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one training process, found 2"):
        check_vllm(config, pair.source)


# --- a run ------------------------------------------------------------------------------------------------------------


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_rows(config.run / "metrics.jsonl") if row["kind"] == "train"]


def test_a_run_learns_from_the_servers_answers(
    recipe: Callable[..., RunConfig], url: str, fake: FakeVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(rollouts={"engine": "vllm", "url": url})
    with caplog.at_level(logging.WARNING):
        train(config)
    trained = rows_of(config)
    assert len(trained) == 4
    assert all(row["sampler_gap_max"] < 1e-4 for row in trained), "each step's answers come from the weights before it"
    assert all(1 <= row["sampler_ratio"] <= 1 + 1e-5 for row in trained)
    assert all(row["sampler_gap"] <= row["sampler_gap_max"] for row in trained)
    assert "is not the model that is trained" not in caplog.text
    assert len(fake.requests()) == 4 * 2 + 2, "two prompts a step, and two for the noise of the scores"


def test_a_stale_server_raises_the_alarm(
    recipe: Callable[..., RunConfig], url: str, fake: FakeVLLM, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """It acknowledges every reload and keeps the weights it had: at first those of the student, so that the gap grows."""
    fake.model, fake.loads = untied(pair.fresh()), False
    config = recipe(rollouts={"engine": "vllm", "url": url}, optim={"lr": 1e-2, "steps": 5}, eval={"every": 5})
    with caplog.at_level(logging.WARNING):
        train(config)
    ratios = [row["sampler_ratio"] for row in rows_of(config)]
    assert ratios[0] < 1 + 1e-5
    assert ratios[-1] > 1.05
    assert ratios[-1] > ratios[1] > ratios[0]
    alarms = [record for record in caplog.records if "is not the model that is trained" in record.getMessage()]
    assert len(alarms) == 1
    assert "stale weights" in alarms[0].getMessage()


def test_the_gap_is_a_mean_of_sizes(prompts: list[Prompt]) -> None:
    """Differences of +0.5 and -0.2 don't cancel: mean 0.35, largest 0.5."""
    group = Group(prompts[0], (torch.tensor([300, 200]),), (True,), served_logp_N=torch.tensor([-1.0, -2.0]))
    found = gap_metrics([group], torch.tensor([-1.5, -1.8]))
    assert found == pytest.approx({"sampler_gap": 0.35, "sampler_gap_max": 0.5, "sampler_ratio": math.exp(0.35)})
    assert gap_metrics([group], None) == {}


def test_the_bar_of_the_alarm() -> None:
    row = {"step": 7, "sampler_gap": 0.0487, "sampler_gap_max": 2.0}
    assert gap_warning({**row, "sampler_ratio": 1.05}) is None
    assert gap_warning({"step": 7}) is None, "no server, no gap"
    assert str(gap_warning({**row, "sampler_ratio": 1.0501})).startswith("step 7: ")
    assert gap_warning({**row, "sampler_ratio": float("nan")}) is not None


def test_a_failing_server_stops_the_run_and_it_goes_on_later(recipe: Callable[..., RunConfig], url: str, fake: FakeVLLM) -> None:
    config = recipe(rollouts={"engine": "vllm", "url": url})
    fake.change = lambda answer: fake.status.update({"/inference/v1/generate": (500, "dead")}) if len(fake.requests()) >= 7 else None
    with pytest.raises(EngineError, match="dead"):
        train(config)
    fake.status.clear()
    fake.change = None
    train(config, resume=True)
    assert [row["step"] for row in rows_of(config)] == [1, 2, 3, 4]


def test_groups_without_a_server_have_no_gap(prompts: list[Prompt]) -> None:
    assert gap_metrics([Group(prompts[0], (torch.tensor([300]),), (False,))], torch.tensor([-1.0])) == {}
