r"""Rows as others publish them -> rows in this package's own fields, each by one small pure function. The columns tell the format.

| format | told by | published as |
|---|---|---|
| `plain` | `problem` | this package's own, and Geometry3K's (hub: hiyouga/geometry3k) |
| `imagefolder` | `file_name` or `file_names` | Hugging Face's ImageFolder: pictures beside a `metadata.jsonl` |
| `virl39k` | `question`, `image`, `qid` | ViRL39K (hub: TIGER-Lab/ViRL39K), its answers in `\boxed{…}` |
| `llava` | `conversations` | LLaVA's instruction data (github: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md) |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vaopd.errors import DataError, did_you_mean

FIELDS = ("id", "images", "image", "problem", "answer", "solution")

Row = Mapping[str, Any]


def _as_it_is(row: Row) -> Row:
    return row


def _nothing(row: Row) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """One way in which rows are written."""

    name: str
    told_by: tuple[frozenset[str], ...]  # any of these sets of columns
    reads: tuple[str, ...]  # every column that it reads
    adapt: Callable[[Row], Row] = _as_it_is  # a row -> FIELDS; raises DataError for a row of another shape
    remark: Callable[[Row], str | None] = _nothing  # what of a row is left unread, to be counted and said
    own: bool = False  # written for this package: an unknown column is a mistake, and not one of the publisher's own
    from_columns: Mapping[str, str] = field(default_factory=dict)  # our field -> the column that it comes from, for messages


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, braces nested; None without one or with one that isn't closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def from_imagefolder(row: Row) -> Row:
    """`file_name` is one image, `file_names` several; everything else is as in `plain`."""
    if mixed := sorted({"image", "images"} & {key for key, value in row.items() if value is not None}):
        raise DataError(f"has both a file name and '{mixed[0]}'. Keep one of them.")
    rest = {key: value for key, value in row.items() if key in FIELDS}
    single, several = row.get("file_name"), row.get("file_names")
    if single is not None and several is not None:
        raise DataError("has both 'file_name' and 'file_names'. Keep one of them.")
    return rest | ({"image": single} if several is None else {"images": several})


def from_virl39k(row: Row) -> Row:
    r"""The answer is what its `\boxed{…}` holds; an answer without one is taken as it is."""
    answer = row.get("answer")
    boxed = last_boxed(answer) if isinstance(answer, str) else None
    return {
        "id": row.get("qid"),
        "images": row.get("image"),
        "problem": row.get("question"),
        "answer": answer if boxed is None else boxed,
    }


def from_llava(row: Row) -> Row:
    """The first question, and the reply to it as the solution: a reply is a text to learn from, no answer to grade by.

    Raises `DataError` for a conversation that does not begin with a person's question.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns):
        raise DataError('\'conversations\' must be a list of {"from": …, "value": …}. Write one per turn.')
    speakers = [turn["from"] for turn in turns[:2]]
    if speakers not in (["human"], ["human", "gpt"]):
        said = ", ".join(map(repr, speakers)) or "nobody"
        raise DataError(f"a conversation must begin with 'human' and go on with 'gpt', but here it is {said}. Take other turns out.")
    adapted = {"id": row.get("id"), "problem": turns[0]["value"], "solution": turns[1]["value"] if len(turns) > 1 else None}
    image = row.get("image")
    images = {"images": image} if isinstance(image, list) else {"image": image}
    return adapted | images | ({"images": row["images"]} if row.get("images") is not None else {})


def _further_turns(row: Row) -> str | None:
    turns = row.get("conversations")
    return "with further turns, of which only the first question and its reply are used" if turns and len(turns) > 2 else None


FORMATS = {
    format_.name: format_
    for format_ in (
        Format("plain", (frozenset({"problem"}),), FIELDS, own=True),
        Format(
            "imagefolder",
            (frozenset({"file_name"}), frozenset({"file_names"})),
            ("file_name", "file_names", *FIELDS),
            from_imagefolder,
            from_columns={"image": "file_name", "images": "file_names"},
        ),
        Format(
            "virl39k",
            (frozenset({"question", "image", "qid"}),),
            ("question", "image", "qid", "answer"),
            from_virl39k,
            from_columns={"problem": "question", "images": "image", "id": "qid"},
        ),
        Format(
            "llava",
            (frozenset({"conversations"}),),
            ("conversations", "image", "images", "id"),
            from_llava,
            remark=_further_turns,
            from_columns={"problem": "conversations", "solution": "conversations"},
        ),
    )
}


def choose_format(columns: Collection[str], wanted: str | None = None) -> Format | None:
    """The format that `columns` tell, or `wanted`; None when they tell none.

    Raises:
        DataError: they tell several, or not the wanted one.
    """
    if wanted is not None:
        format_ = FORMATS.get(wanted)
        if format_ is None:
            raise DataError(f"there is no format '{wanted}'.{did_you_mean(wanted, FORMATS)} Known: {', '.join(FORMATS)}.")
        if not _tell(columns, format_):
            raise DataError(
                f"data.format is {wanted}, which needs {_needs(format_)}, but the columns are: {', '.join(columns) or 'none'}. "
                "Name another format, or rename the columns."
            )
        return format_
    told = [format_ for format_ in FORMATS.values() if _tell(columns, format_)]
    if {format_.name for format_ in told} == {"plain", "imagefolder"}:  # its metadata has a question beside the file's name
        return FORMATS["imagefolder"]
    if len(told) > 1:
        names = " or ".join(format_.name for format_ in told)
        raise DataError(f"the columns ({', '.join(columns)}) can be read as {names}. Say which, as in `data.format: {told[0].name}`.")
    return told[0] if told else None


def known_formats() -> str:
    """The formats and what tells them, for messages."""
    return "; ".join(f"{format_.name}: {_needs(format_)}" for format_ in FORMATS.values())


def _tell(columns: Collection[str], format_: Format) -> bool:
    return any(needed <= set(columns) for needed in format_.told_by)


def _needs(format_: Format) -> str:
    return " or ".join("+".join(sorted(needed)) for needed in format_.told_by)
