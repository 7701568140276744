import pytest

from vaopd.evaluate.grade import is_correct
from vaopd.world.easy_vqa import Question, describe, read_questions


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        ([("what shape is present?", "circle", 0), ("what color is the shape?", "red", 0)], "a red circle"),
        ([("what is the blue shape?", "rectangle", 0)], "a blue rectangle"),
        ([("is there a triangle?", "yes", 0)], "a triangle"),
        ([("is there a triangle?", "no", 0)], ""),
        ([("is there not a triangle?", "no", 0)], "a triangle"),
        ([("is there not a triangle?", "yes", 0)], ""),
        ([("is no red shape present?", "no", 0)], "a red shape"),
        ([("is no red shape present?", "yes", 0)], ""),
        ([("does the image not contain a gray shape?", "yes", 0), ("what color is the rectangle?", "teal", 0)], "a teal rectangle"),
    ],
)
def test_what_questions_tell_of_a_picture(rows, seen):
    assert describe(rows)[0] == seen


def test_the_published_data_is_read_whole_and_never_contradicts_itself():
    train, test = read_questions("train"), read_questions("test")
    assert len(train) + len(test) == 48_248
    assert len({q.picture for q in train}) == 4000
    assert len({q.picture for q in test}) == 1000
    for question in train[:3000]:
        assert is_correct(question.solution, question.answer)
        if question.answer not in ("yes", "no"):
            assert question.answer in question.seen.split()


def test_solution_is_a_sentence(tmp_path):
    question = Question(0, tmp_path, "is there a circle?", "no", "a red triangle")
    assert question.solution == "The image shows a red triangle, so the answer is no."
