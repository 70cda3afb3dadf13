"""Records what the quickstart and `wsync watch` look like: `python examples/recording.py quickstart|watch FILE.svg`.

The command runs for real in a terminal of its own, 80 columns wide; a terminal emulator (pyte) keeps
the screen, and rich writes its last state as an SVG. The pictures beside the examples come from here.
"""

import argparse
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

EXAMPLES = Path(__file__).resolve().parent
COLUMNS, LINES = 80, 60
LIMIT = 90.0  # seconds that a recording takes at most
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width} {height}">
<style>{styles} text {{ font: 20.2px "DejaVu Sans Mono", Menlo, Consolas, monospace; }}</style>
<rect width="{width}" height="{height}" rx="8" fill="#292929"/>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g>{matrix}</g></g>
</svg>
"""


def record(command: list[str], place: Path, env: dict[str, str], until: str = "") -> pyte.Screen:
    """Runs a command in a terminal until it ends, or until these words were seen; gives its screen."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (LINES, COLUMNS))
    deadline = time.monotonic() + LIMIT
    with subprocess.Popen(command, cwd=place, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                stream.feed(os.read(ours, 1 << 16))
            except OSError:  # the command has ended, and nobody has the terminal any more
                break
            if until and any(until in line for line in screen.display):
                deadline, until = min(deadline, time.monotonic() + 1.0), ""  # the panel below the log follows
        process.send_signal(signal.SIGINT)
    os.close(ours)
    if until:
        said = [line for line in screen.display if line.strip()]
        sys.exit("\n".join([f"{until!r} was not seen in {LIMIT:.0f} s:", *said]))
    return screen


def style_of(char: pyte.screens.Char) -> str:
    """What rich calls the colours of a character; brown is what pyte calls yellow."""
    colour = {"default": "", "brown": "yellow"}.get(char.fg, char.fg)
    return f"{'bold ' if char.bold else ''}{colour}".strip()


def text_of(screen: pyte.Screen) -> list[Text]:
    """The screen's lines with their colours, without the empty ones at its end."""
    lines = []
    for row in range(LINES):
        line = Text()
        for style, chars in groupby((screen.buffer[row][column] for column in range(COLUMNS)), style_of):
            line.append("".join(char.data for char in chars), style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Records the quickstart, or a watch, as an SVG.")
    parser.add_argument("what", choices=["quickstart", "watch"])
    parser.add_argument("file", type=Path, help="the SVG to write")
    parser.add_argument("--until", default="version 5,", help="stop a watch once these words are seen")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as runtime:
        place = Path(folder)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        env |= {"TERM": "xterm", "WSYNC_RUNTIME_DIR": runtime, "WSYNC_STATE_DIR": f"{folder}/state"}
        if settings.what == "quickstart":
            screen = record([sys.executable, str(EXAMPLES / "quickstart.py")], place, env)
        else:
            shutil.copytree(EXAMPLES / "cartpole", place, dirs_exist_ok=True)
            (place / "checkpoints").mkdir()
            trainer = [sys.executable, "train.py", "checkpoints", "--every", "3"]
            player = [sys.executable, "play.py"]
            with (
                subprocess.Popen(player, cwd=place, env=env, stdout=subprocess.DEVNULL) as playing,
                subprocess.Popen(trainer, cwd=place, env=env, stdout=subprocess.DEVNULL) as training,
            ):
                try:
                    watch = [sys.executable, "-m", "wsync", "watch", "cartpole.toml"]
                    screen = record(watch, place, env, settings.until)
                finally:
                    training.terminate()
                    playing.terminate()
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        for line in text_of(screen):
            line.plain = line.plain.replace(folder, "/opt/policy")
            console.print(line, no_wrap=True, crop=True)
        settings.file.write_text(console.export_svg(code_format=PAGE, unique_id="wsync"))


if __name__ == "__main__":
    main()
