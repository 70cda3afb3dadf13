"""Writes the man page of wsync from the declarations of its command line: `python examples/man_page.py FILE.1`."""

import sys
from pathlib import Path
from typing import Any

import typer

from wsync import __version__
from wsync.cli.commands import command_line

FILES = (
    ("/dev/shm/wsync-UID", "The segments, one directory for each (--runtime-dir)."),
    ("~/.local/state/wsync, /var/lib/wsync for root", "The history, the pins and the kept checkpoints (--state-dir)."),
)
EXIT_CODES = (
    ("0", "Published, or already current."),
    ("1", "Failed."),
    ("2", "An option, a name or a setting is wrong."),
    ("65", "The checkpoint is rejected."),
    ("66", "There is no complete checkpoint yet."),
    ("75", "Try later."),
)


def escaped(text: str) -> str:
    """Text that roff shows as it stands: no escapes, no requests at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.splitlines())


def entries(pairs: Any) -> list[str]:
    return [line for term, text in pairs for line in (".TP", f".B {escaped(term)}", escaped(text))]


def options(command: Any, context: Any) -> list[tuple[str, str]]:
    """The arguments and options of a command, as its --help lists them."""
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    return [(record[0], record[1]) for record in records if record]


def page() -> str:
    """The whole page, in man(7) macros."""
    group: Any = typer.main.get_command(command_line())
    context = group.context_class(group, info_name="wsync")
    lines = [f'.TH WSYNC 1 "" "wsync {__version__}" "User Commands"', ".SH NAME"]
    lines += [f"wsync \\- {escaped(group.help[0].lower() + group.help[1:].rstrip('.'))}"]
    lines += [".SH SYNOPSIS", ".B wsync", escaped("COMMAND [OPTIONS] [ARGUMENTS]"), ".SH COMMANDS"]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        lines += [f".SS {escaped(' '.join(['wsync', name, *command.collect_usage_pieces(inner)]))}"]
        for paragraph in (command.help or "").split("\n\n"):
            lines += [escaped(paragraph.strip()), ".PP"]
        lines += entries(options(command, inner))
        if command.epilog:
            lines += [".PP", escaped(command.epilog)]
    lines += [".SH EXIT STATUS", *entries(EXIT_CODES)]
    lines += [".SH ENVIRONMENT", escaped("Each option has a variable, WSYNC_ and its name, as in WSYNC_STATE_DIR.")]
    lines += [".SH FILES", *entries(FILES)]
    return "\n".join(line for line in lines if line) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
