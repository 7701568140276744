"""The gates before any weight is read, and what is refused whatever the other model is."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_pair import ENDS, Pair
from vaopd.config import RunConfig
from vaopd.errors import ModelError
from vaopd.models.load import check_agreement, control_ids, load_model, open_source, save_model
from vaopd.train.setup import set_up

Change = Callable[[Path], None]


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def teacher_folder(pair: Pair, tmp_path: Path) -> Path:
    """The teacher's folder without its weights: whatever is answered about it was answered before they are needed."""
    shutil.copytree(pair.teacher_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "teacher"


# --- agreement --------------------------------------------------------------------------------------------------------


def swapped_ids(folder: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary["Ġb"], vocabulary["Ġle"] = vocabulary["Ġle"], vocabulary["Ġb"]

    edit(folder / "tokenizer.json", swap)


def one_more_token(folder: Path) -> None:
    def add(values: dict[str, Any]) -> None:
        last = max(values["model"]["vocab"].values())
        values["added_tokens"].append({**values["added_tokens"][0], "id": last + 1, "content": "<|more|>", "special": False})

    edit(folder / "tokenizer.json", add)
    edit(folder / "config.json", lambda values: values["text_config"].update(vocab_size=values["text_config"]["vocab_size"] + 1))


def another_token_is_special(folder: Path) -> None:
    def mark(values: dict[str, Any]) -> None:
        values["added_tokens"].append({**values["added_tokens"][0], "id": values["model"]["vocab"]["Ġb"], "content": "Ġb"})

    edit(folder / "tokenizer.json", mark)


def vision_ids_swapped(folder: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        values["vision_start_token_id"], values["vision_end_token_id"] = values["vision_end_token_id"], values["vision_start_token_id"]

    edit(folder / "config.json", swap)


def another_end(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda values: values["eos_token_id"].append(500))


def another_chat_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("assistant", "model"), encoding="utf-8")


def another_image_size(folder: Path) -> None:
    edit(folder / "processor_config.json", lambda values: values["image_processor"]["size"].update(longest_edge=32 * 32))


def another_image_mean(folder: Path) -> None:
    edit(folder / "processor_config.json", lambda values: values["image_processor"].update(image_mean=[0.5, 0.5, 0.5]))


def narrow_head(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["text_config"].update(vocab_size=300))


MISMATCHES: list[tuple[Change, str]] = [
    (swapped_ids, "vocabulary: 2 of"),
    (one_more_token, "vocabulary: 1 of"),
    (another_token_is_special, "special ids"),
    (vision_ids_swapped, "special ids: vision_start_token_id is 3"),
    (another_end, "end of a response"),
    (another_chat_template, "chat template"),
    (another_image_size, "image processor: size"),
    (another_image_mean, "image processor: image_mean"),
    (narrow_head, "LM head"),
]


def test_two_models_of_one_family_agree(pair: Pair) -> None:
    check_agreement(pair.source, open_source(str(pair.teacher_folder)))


@pytest.mark.parametrize(("change", "reason"), MISMATCHES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mismatch_is_refused_before_any_weight_is_read(
    recipe: Callable[..., RunConfig], teacher_folder: Path, change: Change, reason: str
) -> None:
    change(teacher_folder)
    with pytest.raises(ModelError, match="don't agree") as caught:
        set_up(recipe(teacher=str(teacher_folder)), on_check=lambda text: None)
    found = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert any(reason in line for line in found), found
    assert len(found) == 1, "one fault, one difference"


def test_every_difference_is_listed(pair: Pair, teacher_folder: Path) -> None:
    for change in (another_end, another_chat_template, another_image_mean):
        change(teacher_folder)
    with pytest.raises(ModelError) as caught:
        check_agreement(pair.source, open_source(str(teacher_folder)))
    assert str(caught.value).count("\n  - ") == 3


def test_the_agreement_is_why_missing_weights_do_not_matter(recipe: Callable[..., RunConfig], teacher_folder: Path) -> None:
    """The counterpart of the mismatches: an agreeing folder gets as far as its weights."""
    with pytest.raises(ModelError, match="can't load") as caught:
        set_up(recipe(teacher=str(teacher_folder)), on_check=lambda text: None)
    assert "don't agree" not in str(caught.value)


def test_control_ids_are_all_special_ones_but_the_ends(pair: Pair) -> None:
    ids = pair.source.processor.tokenizer.convert_tokens_to_ids
    special = ["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    assert control_ids(pair.source) == {ids(token) for token in special}
    assert pair.source.eos_ids == {ids("<|im_end|>"), *ENDS}


# --- folders and files ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_tensors_are_identical(pair: Pair, tmp_path: Path) -> None:
    save_model(pair.student, pair.source.processor, tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    again = load_model(source, dtype=torch.float32)
    ours, theirs = pair.student.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not again.training
    check_agreement(pair.source, source)
    assert not list((tmp_path / "saved").glob("*.bin")), "weights are safetensors"


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_a_saved_folder_names_transformers_own_processor(pair: Pair, file: str) -> None:
    """Its file can be read where torchvision is installed, without this package."""
    assert json.loads((pair.student_folder / file).read_text(encoding="utf-8"))["processor_class"] == "Qwen3VLProcessor"


def test_padding_of_the_head_is_kept_by_a_folder(pair: Pair, tmp_path: Path) -> None:
    padded = pair.fresh()
    padded.resize_token_embeddings(pair.vocab_size + 11, mean_resizing=False)
    save_model(padded, pair.source.processor, tmp_path / "padded")
    source = open_source(str(tmp_path / "padded"))
    assert source.vocab_size == pair.vocab_size
    assert load_model(source, dtype=torch.float32).get_output_embeddings().weight.shape[0] == pair.vocab_size + 11
    check_agreement(pair.source, source)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "builtin:nothing"])
def test_a_folder_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="there is no"):
        open_source(name)


def test_an_unreachable_hub_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="can't load 'nobody/nothing'"):
        open_source("nobody/nothing")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't load"):
        open_source(str(tmp_path))


def test_another_family_is_refused_by_name(pair: Pair, teacher_folder: Path) -> None:
    edit(teacher_folder / "config.json", lambda values: values.update(model_type="qwen2_vl"))
    with pytest.raises(ModelError, match=r"'qwen2_vl' are not supported.*qwen3_vl"):
        open_source(str(teacher_folder))


def test_another_image_token_than_the_processors_is_refused(teacher_folder: Path) -> None:
    edit(teacher_folder / "config.json", lambda values: values.update(image_token_id=7, video_token_id=6))
    with pytest.raises(ModelError, match=r"token 6.*names 7"):
        open_source(str(teacher_folder))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a list", "deleted"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_damaged_folder_is_refused(teacher_folder: Path, file: str, damage: str) -> None:
    path = teacher_folder / file
    content = {"truncated": path.read_text(encoding="utf-8")[:200], "emptied": "", "a list": "[]"}.get(damage)
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    (teacher_folder / "preprocessor_config.json").unlink()  # the older place of the image processor's settings, which would do
    with pytest.raises(ModelError, match="can't load"):
        open_source(str(teacher_folder))


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_unopened(teacher_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (teacher_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    source = open_source(str(teacher_folder))
    with pytest.raises(ModelError, match="can't load"):
        load_model(source, dtype=torch.float32)
    assert not canary.exists()
    pickle.loads((teacher_folder / "pytorch_model.bin").read_bytes())
    assert canary.exists(), "the canary works"


def test_harmless_pickled_weights_are_refused_too(pair: Pair, teacher_folder: Path) -> None:
    """No fallback to another loader, whatever is in the file."""
    torch.save(pair.teacher.state_dict(), teacher_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can't load"):
        load_model(open_source(str(teacher_folder)), dtype=torch.float32)


def with_remote_code(folder: Path, canary: Path) -> None:
    """A module beside the configuration that touches the canary when it is imported, named wherever transformers looks for one."""
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    auto_map = dict.fromkeys(names, "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]  # type: ignore[assignment]
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        edit(folder / file, lambda values: values.update(auto_map=auto_map))


def test_a_model_that_needs_its_own_code_is_refused_unrun(teacher_folder: Path, tmp_path: Path) -> None:
    with_remote_code(teacher_folder, tmp_path / "canary")
    edit(teacher_folder / "config.json", lambda values: values.update(model_type="evil"))
    with pytest.raises(ModelError, match=r"type 'evil' are not supported.*no code that comes with a checkpoint is run"):
        open_source(str(teacher_folder))
    assert not (tmp_path / "canary").exists()


def test_code_beside_a_known_model_is_not_run(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.teacher_folder, tmp_path / "teacher")
    with_remote_code(tmp_path / "teacher", tmp_path / "canary")
    with contextlib.suppress(ModelError):  # refusing is as good as ignoring it
        load_model(open_source(str(tmp_path / "teacher")), dtype=torch.float32)
    assert not (tmp_path / "canary").exists()


def test_damaged_weights_are_refused(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.teacher_folder, tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't load"):
        load_model(open_source(str(tmp_path / "teacher")), dtype=torch.float32)


@pytest.mark.parametrize(("how", "reason"), [("missing", r"lack 1 tensors.*linear_fc1\.weight"), ("another shape", "can't load")])
def test_weights_of_another_model_are_refused(pair: Pair, tmp_path: Path, how: str, reason: str) -> None:
    """A tensor that the file lacks would be drawn at random."""
    shutil.copytree(pair.teacher_folder, tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "visual.blocks.1.mlp.linear_fc1.weight" in name)
    tensor = tensors.pop(name)
    if how == "another shape":
        tensors[name] = tensor[:-1].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=reason):
        load_model(open_source(str(tmp_path / "teacher")), dtype=torch.float32)
