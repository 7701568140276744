from PIL import Image

from vaopd.analysis.dissect import dissect
from vaopd.world.questions import Figure


def figure(kind, labels, answer):
    return Figure(Image.new("RGB", (1, 1)), labels, kind, "", "", answer)


def test_answers_taken_apart_by_hand():
    perimeter = figure("perimeter", (3, 5, 4), "12")
    assert dissect("On the board, the sides are 3, 5 and 4. Their sum is 3+5=8, 8+4=12. The answer is 12.", perimeter) == (1, True)
    # one label misread, the rest follows from it
    assert dissect("the sides are 3, 6 and 4. Their sum is 3+6=9, 9+4=13. The answer is 13.", perimeter) == (2 / 3, True)
    # all read, a slip
    assert dissect("the sides are 3, 5 and 4. Their sum is 3+5=9, 9+4=13. The answer is 13.", perimeter) == (1, False)
    # right by luck: what was read gives another answer
    assert dissect("the sides are 4, 5 and 4. The answer is 12.", perimeter) == (2 / 3, False)
    assert dissect("I cannot see.", perimeter) == (0, False)
    assert dissect("the sides are 5, 3. The answer is 8.", perimeter) == (0, False)
