"""Grading by rule, as a table: what a response says, what is right, whether they agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaopd.evaluate.grade import final_answer, is_correct

RIGHT = [
    # where the answer stands
    ("The answer is 12.", "12"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is: 12", "12"),
    ("**The answer is:** 12", "12"),
    ("Answer: 12", "12"),
    ("**Answer**: 12", "12"),
    ("Answer: is 12", "12"),
    ("**Answer:** 12", "12"),
    ("The final answer is **12**.", "12"),
    ("ANSWER = 12", "12"),
    ("The answer is\n12", "12"),
    ("The answer is $12$.", "12"),
    ("The answer is 5. No, wait, the answer is 7.", "7"),
    ("The sides are 3, 4 and 5, so 12", "12"),
    ("12", "12"),
    (" 12 \n", "12"),
    # boxed
    (r"so \boxed{12}", "12"),
    (r"\boxed{5} is wrong; \boxed{12}.", "12"),
    (r"The answer is 7. \boxed{12}", "12"),
    (r"\boxed{12} and then 99 more words", "12"),
    (r"\boxed{\text{a} {b}}", r"\text{a} {b}"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"$\boxed{-\dfrac{3}{4}}$", "-3/4"),
    (r"\boxed{the triangle}", "triangle"),
    (r"\boxed{1}", r"\frac { 2 } { 2 }"),
    # numbers
    ("The answer is 0.50", "1/2"),
    ("The answer is 1/2", "0.5"),
    ("The answer is 3 / 4", "0.75"),
    ("The answer is 2/4", "1/2"),
    ("The answer is .5", "0.5"),
    ("The answer is 12.0", "12"),
    ("The answer is 12", "12.0"),
    ("The answer is 1,234", "1234"),
    ("The answer is 1,234,567.5.", "1234567.5"),
    ("The answer is 1234", "1,234"),
    ("The answer is -5", "-5"),
    ("The answer is +5", "5"),
    ("The answer is -1/3", "-2/6"),
    ("The answer is 007", "7"),
    ("The answer is 3.1415927", "3.1415926"),
    ("The answer is 0", "0.0"),
    ("The answer is -0", "0"),
    # words
    ("The answer is red.", "Red"),
    ("The answer is the triangle.", "triangle"),
    ("The answer is a circle", "Circle"),
    ("The answer is 'yes'", "yes"),
    ("The answer is yes!", "yes"),
    ("Yes", "yes"),
    ("The answer is B", "b"),
    ("The answer is dark   blue.", "dark blue"),
    ("The answer is blue.\nI hope this helps.", "blue"),
    ("The answer is Straße.", "STRASSE"),
]

WRONG = [
    ("The answer is 13.", "12"),
    ("The answer is 3.5.", "3"),
    ("The answer is 3.", "3.5"),
    ("The answer is -5", "5"),
    ("The answer is 5", "-5"),
    ("The answer is 1/3", "0.333"),
    ("The answer is 1/3", "3"),
    ("The answer is 100001", "100000"),
    ("The answer is 0.0000001", "0"),
    ("The answer is 3,5", "35"),
    ("The answer is 3,5", "3.5"),
    ("The answer is 12,34", "1234"),
    ("The answer is 3, 5", "35"),
    ("The answer is 1/0", "0"),
    (r"\boxed{1\frac{1}{2}}", "11/2"),
    ("The answer is not 12", "12"),
    ("The answer is 12 cm", "12"),  # units are not read
    ("The answer is 50%", "50"),
    ("The answer is twelve", "12"),
    ("The answer is red or blue", "red"),
    ("12, so the answer is 13", "12"),
    (r"\boxed{13} The answer is 12", "12"),
    (r"\boxed{12", "13"),
    ("", "12"),
    ("", "yes"),
    ("The answer is", "12"),
    ("The answer is redder", "red"),
    ("I don't know", "12"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response: str, answer: str) -> None:
    assert is_correct(response, answer), final_answer(response)


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response: str, answer: str) -> None:
    assert not is_correct(response, answer), final_answer(response)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"a \boxed{\frac{1}{2}} b", "1/2"),
        (r"\boxed{\sqrt{2} + {3}}", r"\sqrt{2} + {3}"),
        (r"\boxed{12", "12"),  # never closed: the last number is what is left
        ("the sides are 3, 4 and 5", "5"),
        ("no number at all.", "no number at all"),
        ("Answer: 3.5 m. And so on", "3.5 m"),
        ("", ""),
    ],
)
def test_what_counts_as_the_final_answer(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@given(st.integers(-(10**9), 10**9))
def test_an_integer_equals_itself_however_written(number: int) -> None:
    for text in (f"{number}", f"{number:,}", f"{number}.0", rf"\boxed{{{number}}}", f"The answer is {number:,}."):
        assert is_correct(text, str(number)), text
        assert not is_correct(text, str(number + 1 if abs(number) < 10**5 else number * 2)), text


@given(st.text(), st.text())
def test_any_text_can_be_graded(response: str, answer: str) -> None:
    assert is_correct(response, answer) in (True, False)


@given(st.text(alphabet="0123456789,./-+ {}\\boxedfrac", max_size=40))
def test_anything_like_a_number_can_be_graded(text: str) -> None:
    assert is_correct(text, "3") in (True, False)
    assert is_correct("3", text) in (True, False)


def test_grading_is_quick_on_long_texts() -> None:
    for text in ("1," * 50_000, "answer is " * 20_000, r"\boxed{" * 20_000, "1/" * 50_000, "answer" + " " * 50_000, "\\frac{1}{" * 20_000):
        is_correct(text, "3")
