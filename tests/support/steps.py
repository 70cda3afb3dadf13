"""The protocol's steps as the essay names them and as the code marks them, and who runs through which."""

from __future__ import annotations

import io
import re
import sys
import tokenize
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import wsync
from wsync.segment import segment

SOURCE = Path(wsync.__file__).parent
_STEP = re.compile(r"# ([PR]\d \w+)")


class Line(NamedTuple):
    """A line of code that does a step."""

    step: str
    file: str
    number: int


def essay() -> list[str]:
    """The steps of the table in the essay, the publisher's first."""
    assert segment.__doc__
    return sorted(re.findall(r"(?:^|  )([PR]\d \w+)  ", segment.__doc__, re.MULTILINE))


def code() -> list[Line]:
    """The lines that carry the name of a step as their comment, in the order of files and lines."""
    return [
        Line(match[1], str(path), token.start[0])
        for path in sorted(SOURCE.rglob("*.py"))
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.COMMENT and (match := _STEP.fullmatch(token.string))
    ]


class Trace:
    """The steps that run in this thread while the block does, in their order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._lines = {(line.file, line.number): line.step for line in code()}
        self._files = {line.file for line in code()}
        self._before: Any = None

    def __enter__(self) -> Trace:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        step = self._lines.get((frame.f_code.co_filename, frame.f_lineno)) if event == "line" else None
        if step and step not in self.steps[-1:]:
            self.steps.append(step)
        return self._line
