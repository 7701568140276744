"""Files that are whole or not there, and folders with one writer."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vaopd.errors import CheckpointError


def replace_text(path: Path, text: str) -> None:
    """Write a text file as a whole: a reader sees what was there before or all of it, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


@contextmanager
def claimed(folder: Path, option: str) -> Iterator[None]:
    """Inside, no other process on this machine that claims the folder writes to it. The claim ends with the process, however it ends.

    Args:
        folder: made where it isn't there.
        option: what names another folder on the command line, for the message.

    Raises:
        CheckpointError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"another process is writing to {folder}. Wait for it, or stop it; or give another folder: {option}"
        ) from None
    try:
        yield
    finally:
        os.close(handle)
