"""Keeps text of users from becoming control tokens (turn ends, image placeholders, thinking marks).

A tokenizer turns every occurrence of an added token's string into that token, wherever it stands. Here each occurrence inside user text
is cut after its first character, by inserting a *separator*: a special token of the same tokenizer that the text around it does not
use. The tokenizer splits its input there and matches the occurrence no more; the separator's ids are then taken out. The processor sees
ordinary text all the time, so this needs nothing from its family.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from vaopd.errors import DataError


class ControlText:
    """The control strings of one processor: finds, cuts, and checks them. Ids are Python integers throughout."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        added = {str(token): (int(id_), token) for id_, token in self._tokenizer.added_tokens_decoder.items()}
        strings = {string for string, (_, token) in added.items() if _is_control(string, token)}
        self._ids = {added[string][0] for string in strings} - {self._tokenizer.unk_token_id}
        strings |= _placeholders(processor)
        longest_first = sorted(strings, key=lambda string: (-len(string), string))
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._all = re.compile(alternatives)
        self._overlapping = re.compile(f"(?=({alternatives}))")
        self._separators = [
            string
            for string, (_, token) in sorted(added.items(), key=lambda item: item[1][0])
            if token.special and not (token.lstrip or token.rstrip or token.single_word) and string not in _placeholders(processor)
        ]

    def found(self, text: str) -> list[str]:
        """The control strings in `text`, as a tokenizer would match them: left to right, the longest first."""
        return self._all.findall(text)

    def first_id(self, text: str) -> int | None:
        """The id of the first control token in `text`."""
        found = [string for string in self.found(text) if string in self._tokenizer.get_added_vocab()]
        return self._tokenizer.convert_tokens_to_ids(found[0]) if found else None

    def separator(self, surrounding: str) -> str:
        """A special token's string that `surrounding` does not use."""
        for string in self._separators:
            if string not in surrounding:
                return string
        raise DataError("the text contains control text, and this tokenizer has no spare special token to keep it apart. Reword the text.")

    def cut(self, text: str, separator: str) -> tuple[str, int]:
        """`text` with a separator inside every control string, and how many were put in.

        Raises `DataError` for a control string of one character, which can't be cut.
        """
        positions = sorted({match.start() + 1 for match in self._overlapping.finditer(text)})
        if any(len(match[1]) == 1 for match in self._overlapping.finditer(text)):
            raise DataError("the text contains a control token of a single character, which can't be written as text. Reword the text.")
        starts = [0, *positions]
        return separator.join(text[start:end] for start, end in zip(starts, [*positions, len(text)], strict=True)), len(positions)

    def remove(self, ids: Sequence[int], separator: str, count: int) -> list[int]:
        """`ids` without the separator's, of which there must be `count`."""
        unwanted = self._tokenizer.convert_tokens_to_ids(separator)
        kept = [id_ for id_ in ids if id_ != unwanted]
        if len(ids) - len(kept) != count:
            raise DataError("the text contains control text that this tokenizer can't keep apart. Reword the text.")
        return kept

    def encode(self, text: str) -> list[int]:
        """User text alone -> ids, none of them a control token; the same as the tokenizer's for ordinary text.

        Raises `DataError` when that's impossible, or when text with control strings would no longer read the same.
        """
        if not self.found(text):
            ids = self._encode(text)
        else:
            separator = self.separator("")
            cut, count = self.cut(text, separator)
            ids = self.remove(self._encode(cut), separator, count)
            reads = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if unicodedata.normalize("NFC", reads) != unicodedata.normalize("NFC", text):  # many tokenizers normalise to NFC
                raise DataError(
                    "the text contains control text, and reads differently when written without control tokens. Reword the text."
                )
        if not self._ids.isdisjoint(ids):
            tokens = sorted({str(self._tokenizer.convert_ids_to_tokens(id_)) for id_ in self._ids.intersection(ids)})
            raise DataError(f"the tokenizer turns part of the text into control tokens ({', '.join(tokens)}). Reword the text.")
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _is_control(string: str, token: Any) -> bool:
    # Some tokenizers add plain runs of white space as tokens (Gemma's "\n\n"): ordinary text, which the model expects as such.
    return token.special or bool(string.replace("▁", "").strip())


def _placeholders(processor: Any) -> set[str]:
    """Strings that the processor itself expands; not all of them are tokens of the tokenizer."""
    values = (value for name, value in vars(processor).items() if name.endswith("_token"))
    return {str(value) for value in values if isinstance(value, str) and value}
