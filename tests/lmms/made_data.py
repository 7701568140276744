"""Made data in the columns of the eight benchmarks, and task files that give it to lmms-eval's own code; run in lmms-eval's environment.

Each task file includes lmms-eval's and changes where the data is, so prompts, `process_results` and aggregations are the real ones.
"""

import json
import sys
from pathlib import Path

import lmms_eval
from datasets import Dataset, Image
from PIL import Image as Pillow

TASKS = Path(lmms_eval.__file__).parent / "tasks"
OURS = Path(sys.argv[2])  # vaopd's lmms_tasks
PICTURE = Pillow.new("RGB", (32, 32), "navy")


def wemath():
    """Answered A. Problem 1: steps A, A, whole A. 2: A, A, whole B. 3: A, B, whole A. 4: B, A, B, whole A. 5: B, B, whole B."""
    for problem, answers in enumerate(["AAA", "AAB", "ABA", "BABA", "BBB"], 1):
        steps = len(answers) - 1
        for step, answer in zip([*range(1, steps + 1), "multi"], answers, strict=True):
            yield {
                "ID": str(problem), "split": "testmini", "knowledge concept": "area", "question": "How large?", "option": "A. 1; B. 2",
                "answer": answer, "image_path": PICTURE, "key": f"{steps}steps_{step}", "question number": 1,
                "knowledge concept description": "area",
            }  # fmt: skip


def mathvista():
    """The judge always extracts 7."""
    for pid, answer in enumerate(["7", "7", "8", "9"], 1):
        yield {
            "pid": str(pid), "question": "How many?", "query": "How many?", "image": "", "decoded_image": PICTURE, "choices": None,
            "unit": "", "precision": 1.0, "answer": answer, "question_type": "free_form", "answer_type": "integer",
            "metadata": {
                "split": "testmini", "category": "math", "task": "figure", "context": "plot", "grade": "high", "language": "english",
                "skills": ["counting"], "source": "made", "img_height": 32, "img_width": 32,
            },
        }  # fmt: skip


def mathverse():
    """The judge says 1 where the question ends in 'right?'. Two versions of a problem."""
    for index, (problem, right) in enumerate([(1, True), (1, False), (2, True), (2, True), (3, False)], 1):
        question = "Is it right?" if right else "Is it wrong?"
        yield {
            "sample_index": str(index), "problem_index": str(problem), "problem_version": "Text Lite", "question": question,
            "image": PICTURE, "answer": "C", "question_type": "multi-choice", "query_wo": question, "query_cot": question,
            "question_for_eval": question, "metadata": {"split": "testmini", "source": "made", "subject": "Plane", "subfield": "Area"},
        }  # fmt: skip


def hallusion():
    """Answered yes. (set, figure, question) -> right answer; the judge says correct where the reference answer begins with Yes."""
    for set_, figure, question, right in [(0, 1, 0, "1"), (0, 1, 1, "1"), (0, 2, 0, "0"), (0, 2, 1, "1"), (1, 1, 0, "1"), (1, 1, 1, "0")]:
        for category in ("VD", "VS"):
            yield {
                "category": category, "subcategory": "chart", "visual_input": "1", "set_id": str(set_), "figure_id": str(figure),
                "sample_note": "", "question_id": str(question), "question": "Is it so?", "gt_answer": right,
                "gt_answer_details": "Yes, it is." if right == "1" else "No, it isn't.", "filename": "", "image": PICTURE,
            }  # fmt: skip


def ai2d():
    for answer in ("0", "0", "1", "2"):
        yield {"question": "Which?", "options": ["a leaf", "a root", "a stem"], "answer": answer, "image": PICTURE}


def mmmu():
    """Answered A: two letters, and open answers: a number, a word with an a in it, an a that stands alone."""
    rows = [("multiple-choice", "A"), ("multiple-choice", "B"), ("open", "12"), ("open", "answer"), ("open", "A")]
    for index, (kind, answer) in enumerate(rows, 1):
        yield {
            "id": f"validation_{'Art' if index < 4 else 'Math'}_{index}", "question": "Which is in <image 1>?",
            "options": "['a leaf', 'a root']" if kind == "multiple-choice" else "[]", "question_type": kind, "answer": answer,
            "image_1": PICTURE,
        }  # fmt: skip


def mmstar():
    """Three questions of one sub-category, one of another."""
    for index, (category, sub, answer) in enumerate(
        [("math", "geometry", "A"), ("math", "geometry", "B"), ("math", "geometry", "C"), ("logical reasoning", "diagram reasoning", "A")]
    ):
        yield {
            "index": index,
            "question": "Which? A: 1, B: 2",
            "image": PICTURE,
            "answer": answer,
            "category": category,
            "l2_category": sub,
        }


def ocrbench():
    for question_type, answer in [("Doc-oriented VQA", ["A"]), ("Doc-oriented VQA", ["7"]), ("Digit String Recognition", ["a"])]:
        yield {"dataset": "made", "question": "What is written?", "question_type": question_type, "answer": answer, "image": PICTURE}


MADE = {
    "wemath": (wemath, TASKS / "wemath/reasoning/wemath_testmini_thinking.yaml", "image_path"),
    "mathvista": (mathvista, TASKS / "mathvista/mathvista_testmini_format.yaml", "decoded_image"),
    "mathverse": (mathverse, TASKS / "mathverse/mathverse_testmini.yaml", "image"),
    "hallusionbench": (hallusion, TASKS / "hallusion_bench/hallusion_bench_image.yaml", "image"),
    "hallusionbench_rule": (hallusion, OURS / "hallusion_bench_image_rule.yaml", "image"),
    "ai2d": (ai2d, TASKS / "ai2d/ai2d.yaml", "image"),
    "mmmu": (mmmu, TASKS / "mmmu/mmmu_val.yaml", "image_1"),
    "mmstar": (mmstar, TASKS / "mmstar/mmstar.yaml", "image"),
    "ocrbench": (ocrbench, TASKS / "ocrbench/ocrbench.yaml", "image"),
}


def main(folder: Path) -> None:
    for name, (rows, task, column) in MADE.items():
        data = folder / f"{name}.parquet"
        Dataset.from_list(list(rows())).cast_column(column, Image()).to_parquet(data)
        made = {"include": str(task), "task": f"made_{name}", "dataset_path": "parquet", "dataset_name": None, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(made | {"dataset_kwargs": {"data_files": {"test": str(data)}}}))


main(Path(sys.argv[1]).resolve())
