"""easy-VQA, a data set published by others, as our rows, and a teacher and a student for it: `python -m vaopd.world.easy_vqa FOLDER`.

easy-VQA (https://github.com/vzhou842/easy-VQA, MIT) has 4,000 training and 1,000 test pictures of a coloured shape with 48,248
questions whose answers are single words. Distillation needs sentences, so each answer is phrased as one; what the sentence says about
the picture is what the published questions about that picture tell. Its own split is kept: training rows and models come from the
training pictures, the test rows from the test pictures.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vaopd.data.images import decode
from vaopd.data.sources import write_examples
from vaopd.types import Example
from vaopd.world.build import LARGE, SMALL, Pupil, make
from vaopd.world.tiny import Lesson, Phase, build_processor

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "blue", "green", "yellow", "teal", "black", "gray", "brown")
BACKGROUND = (230, 230, 228)  # the pictures' mean colour
DESCRIBE = "what does the image show?"
SIZES = {"train": 4096, "eval": 64, "test": 1000}  # rows drawn for the runs
# Of the degraded view: one pixel is left of 64. The paper's 0.1 leaves 6 x 6, in which these large flat shapes are still seen.
RATIO = 0.03
HELD_OUT_PICTURES = 200  # training pictures kept from models and training rows, to choose a checkpoint


@dataclass(frozen=True)
class Question:
    """One published question."""

    picture: int
    path: Path
    text: str
    answer: str
    seen: str  # what all questions about the picture tell of it: "a red circle", "a circle", "a red shape" or ""

    @property
    def solution(self) -> str:
        """The answer phrased as a sentence."""
        return f"The image shows {self.seen}, so the answer is {self.answer}." if self.seen else f"The answer is {self.answer}."


def read_questions(split: str) -> list[Question]:
    """All published questions of `train` or `test`."""
    import easy_vqa

    get_questions, get_paths = (getattr(easy_vqa, f"get_{split}_{what}") for what in ("questions", "image_paths"))
    rows = list(zip(*get_questions(), strict=True))
    paths, seen = get_paths(), describe(rows)
    return [Question(picture, Path(paths[picture]), text, answer, seen[picture]) for text, answer, picture in rows]


def describe(rows: Iterable[tuple[str, str, int]]) -> dict[int, str]:
    """What the questions about a picture, with their answers, tell of its shape and colour."""
    told: dict[int, dict[str, str]] = defaultdict(dict)
    for text, answer, picture in rows:
        told[picture] |= {kind: word for kind, words in (("shape", SHAPES), ("colour", COLOURS)) if (word := _told(text, answer, words))}
    return {picture: _phrase(facts.get("shape"), facts.get("colour")) for picture, facts in told.items()}


def _told(text: str, answer: str, words: Sequence[str]) -> str | None:
    """The word of this kind that question and answer say is true of the picture."""
    if answer in words:
        return answer
    denies = " not " in f" {text} " or text.startswith("is no ")
    named = re.search(rf"\b({'|'.join(words)})\b", text)
    asserted = answer not in ("yes", "no") or (answer == "yes") != denies
    return named.group(1) if named and asserted else None


def _phrase(shape: str | None, colour: str | None) -> str:
    words = " ".join(word for word in (colour, shape or ("shape" if colour else None)) if word)
    return f"a {words}" if words else ""


def write_data(folder: Path) -> None:
    """Rows for training, choosing a checkpoint, and testing, drawn with a fixed seed; no picture is in two sets."""
    published = {"train": read_questions("train"), "test": read_questions("test")}
    kept = {
        "train": [q for q in published["train"] if q.picture >= HELD_OUT_PICTURES],
        "eval": [q for q in published["train"] if q.picture < HELD_OUT_PICTURES],
        "test": published["test"],
    }
    for name, questions in kept.items():
        rows = random.Random(f"easy-vqa|{name}").sample(list(enumerate(questions)), SIZES[name])
        write_examples((_example(name, number, question) for number, question in rows), folder, name)


def _example(name: str, number: int, question: Question) -> Example:
    return Example(f"{name}-{number}", (question.path,), question.text, question.answer, question.solution)


def pupils() -> Sequence[Pupil]:
    """A teacher, and a student that learned for a shorter time; both from training pictures alone."""
    questions = [q for q in read_questions("train") if q.picture >= HELD_OUT_PICTURES]
    pictures: dict[Path, Image.Image] = {path: decode(path) for path in {q.path for q in questions}}
    full = [q for q in questions if len(q.seen.split()) == 3 and "shape" not in q.seen]

    def look(rng: random.Random) -> Lesson:
        question = rng.choice(full)
        return Lesson(pictures[question.path], DESCRIBE, question.seen)

    def solve(rng: random.Random) -> Lesson:
        question = rng.choice(questions)
        return Lesson(pictures[question.path], question.text, question.solution)

    def phases(looking: int, solving: int) -> tuple[Phase, ...]:
        return Phase(look, looking, batch=64, lr=1e-3), Phase(solve, solving, batch=32, lr=1e-3, degraded=0.15, ratio=RATIO)

    return Pupil("teacher", LARGE, phases(200, 1200), seed=20), Pupil("student", SMALL, phases(200, 400), seed=30)


def main() -> None:
    """Write `FOLDER/data` and `FOLDER/models`, each unless it is there."""
    parser = argparse.ArgumentParser(description="Convert easy-VQA to rows and train a teacher and a student for it.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "data" / "test.jsonl").exists():
        write_data(folder / "data")
    questions = read_questions("train")
    words = sorted({q.text for q in questions} | {q.solution for q in questions} | {DESCRIBE})
    processor = build_processor(words, side=64, background=BACKGROUND)
    for pupil in pupils():
        if not (folder / "models" / pupil.name / "model.safetensors").exists():
            make(pupil, processor, folder / "models")


if __name__ == "__main__":
    main()
