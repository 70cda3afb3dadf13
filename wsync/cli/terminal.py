"""What the commands share: printing an error, ending at a signal, and tables; rich is loaded only to draw one."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from ..errors import WsyncError, harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE = 100_000  # columns in a pipe or a file, so that no line is broken


def complain(exc: WsyncError) -> None:
    print(f"wsync: {harmless(str(exc))}", file=sys.stderr)


def unwind_at(*numbers: int) -> None:
    """Raises SystemExit at the first of these signals, so that what was started is cleaned up; ignores later ones."""

    def end(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores SIGHUP
            signal.signal(number, end)


def stdout_console() -> Console:
    """The console for tables: as wide as the terminal; in a pipe or a file, each row is one line, however long."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE
    return console


def plain_table(*columns: str) -> Table:
    """A table without rules; a text that does not fit is folded, unless its column says otherwise."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
