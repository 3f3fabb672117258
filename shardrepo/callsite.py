"""Where in the user's code something was called, noted cheaply enough for every checkout."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from traceback import StackSummary
from types import CodeType
from typing import Final

import sqlalchemy

# Frames of these are not the user's; the driver is beside SQLAlchemy, and is not loaded for this.
_ORM: Final = Path(sqlalchemy.__file__ or "").parent
_LIBRARIES: Final = (
    *(str(folder) + os.sep for folder in (Path(__file__).parent, _ORM, _ORM.with_name("psycopg"))),
    contextlib.__file__,
    "<sqlalchemy",
)


class CallSite:
    """The stack at one moment: code and line of each frame, without the frames, which would keep their variables.

    As a string it is a traceback that ends where the user's code called the library.

    Attributes:
        thread: The name of the thread that it is of.
    """

    __slots__ = ("_lines", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread().name
        self._lines: list[tuple[CodeType, int]] = []
        frame = sys._getframe(1)
        while frame is not None:
            self._lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back  # type: ignore[assignment]  # None at the outermost

    def __str__(self) -> str:
        return "".join(StackSummary.from_list(self._frames).format()).rstrip()

    @property
    def line(self) -> str:
        """The innermost file and line of the user's."""
        filename, lineno, _, _ = self._frames[-1]
        return f"{filename}:{lineno}"

    @property
    def _frames(self) -> list[tuple[str, int, str, None]]:
        lines = list(reversed(self._lines))
        while len(lines) > 1 and lines[-1][0].co_filename.startswith(_LIBRARIES):
            lines.pop()
        return [(code.co_filename, lineno, code.co_qualname, None) for code, lineno in lines]
