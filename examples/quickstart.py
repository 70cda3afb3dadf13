"""Watch a policy get better while it plays, in under a minute: `python examples/quickstart.py`.

Three processes start: a trainer that learns CartPole and writes checkpoints, `wsync watch` that
brings each one into shared memory, and a policy process that plays on and is never restarted. Each
version that reaches it becomes a line here. Everything lives in temporary directories, so nothing
else on the box is touched, and however it ends, no process and no shared memory stays behind.
"""

import importlib.util
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CARTPOLE = Path(__file__).resolve().parent / "cartpole"
DELAY, LEARN, EVERY = 5.0, 26.0, 2.0  # seconds: untrained, learning, between two checkpoints
LIMIT = 55.0  # seconds until it ends, however far it came
GRACE, ENOUGH = 6.0, 4  # after the last checkpoint: seconds at most, episodes that suffice
BEST = 500.0  # the return of a CartPole episode that never falls

needed = ("gymnasium", "rich", "torch", "wsync")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    print(f"{', '.join(missing)} not found; install with: pip install 'wsync[examples]'",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

from rich.console import Console  # noqa: E402 (only now known to be there)
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402


class ChildFailed(Exception):
    """A child ended before its time; the message ends with the last it had to say."""


class Child:
    """One child process; its JSON lines become events, its latest lines stay in `tail`."""

    def __init__(self, role: str, command: list[str], env: dict[str, str], events: "queue.Queue[Any]") -> None:
        self.role, self.events = role, events
        self.tail: deque[str] = deque(maxlen=15)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C comes here alone, and here the children are stopped
        )
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.tail.append(line.rstrip())
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    self.events.put((self.role, event))

    def last_words(self) -> str:
        """How it ended, and the last that it had to say."""
        self.listener.join(1.0)
        return "\n  ".join([f"{self.role} ended with {self.process.returncode}:", *self.tail])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join(1.0)


@dataclass
class Row:
    """What is known of one version; only episodes that it played from first step to last count."""

    version: int
    step: int
    arrived: float
    returns: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.returns) if self.returns else None


class Board:
    """Everything the trainer and the policy process reported, and how it is shown."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: dict[int, Row] = {}
        self.saved: dict[int, float] = {}  # by step: when the checkpoint got its name
        self.complaint = ""  # the latest of wsync watch

    def note(self, event: dict[str, Any]) -> None:
        """Keep what wsync watch complains of, for when it turns out to matter."""
        if event.get("level") in ("warning", "error"):
            self.complaint = str(event.get("reason") or event.get("message"))

    def take(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "checkpoint":
                self.saved[event["step"]] = event["time"]
            case "version":
                if self.rows:
                    self.show(self.latest)
                row = Row(event["version"], event["step"], event["time"])
                self.rows[row.version] = row
            case "episode" if event["first_version"] == event["last_version"]:
                self.rows[event["last_version"]].returns.append(event["return"])

    @property
    def latest(self) -> Row:
        return self.rows[max(self.rows)]

    def finished(self) -> bool:
        """Whether the last checkpoint has arrived and played `ENOUGH` episodes."""
        if not self.rows or self.latest.step != max(self.saved, default=None):
            return False
        return len(self.latest.returns) >= ENOUGH

    def show(self, row: Row) -> None:
        mark = "#" if self.console.options.ascii_only else "█"
        mean = "-" if row.mean is None else f"{row.mean:.1f}"
        line = Text(f"{row.version:>7} {row.step:>7} {len(row.returns):>9} {mean:>12}  ")
        self.console.print(line.append(mark * round((row.mean or 0.0) / BEST * 36), style="green"))

    def milliseconds(self, row: Row) -> float | None:
        """From the checkpoint's file to the policy; None where the policy was only starting."""
        if row.version == min(self.rows) or row.step not in self.saved:
            return None
        return (row.arrived - self.saved[row.step]) * 1e3

    def close(self) -> bool:
        """Print the closing table; True if versions kept arriving and the return climbed."""
        rows = list(self.rows.values())
        table = Table(title="What the policy process played, without a restart")
        for name in ("version", "step", "episodes", "mean return", "ms from file to policy"):
            table.add_column(name, justify="right")
        for row in rows:
            took = self.milliseconds(row)
            table.add_row(
                str(row.version),
                str(row.step),
                str(len(row.returns)),
                "-" if row.mean is None else f"{row.mean:.1f}",
                "-" if took is None else f"{took:.1f}",
            )
        self.console.print(table)
        if problem := self.problem():
            self.console.print(problem)
            if self.complaint:
                self.console.print(f"wsync watch: {self.complaint}")
            return False
        known = [ms for row in rows if (ms := self.milliseconds(row)) is not None]
        self.console.print(
            f"{len(rows)} versions, {statistics.median(known):.1f} ms from file to policy "
            f"(median), mean return {self.means[0]:.0f} -> {self.means[-1]:.0f}."
        )
        return True

    @property
    def means(self) -> list[float]:
        return [row.mean for row in self.rows.values() if row.mean is not None]

    def problem(self) -> str:
        """What went wrong; nothing where versions kept coming and the return climbed."""
        if len(self.rows) < 3 or not self.saved:
            return f"Only {len(self.rows)} versions arrived; at least 3 were expected."
        last = max(self.saved)
        if self.latest.step != last and time.time() - self.saved[last] > GRACE / 2:
            return f"The checkpoint of step {last} did not arrive."
        if not self.means or statistics.fmean(self.means[-3:]) < 2 * self.means[0]:
            return "The return did not climb as it should have."
        return ""


def run(board: Board, env: dict[str, str], checkpoints: Path, stop: threading.Event) -> None:
    """Start the three processes and follow them until the last version has shown what it can."""
    events: queue.Queue[Any] = queue.Queue()
    spec, directory = str(CARTPOLE / "cartpole.toml"), str(checkpoints)
    times = [f"--delay={DELAY}", f"--seconds={LEARN}", f"--every={EVERY}"]
    with ExitStack() as children, board.console.status("starting ...") as status:
        watch, policy, trainer = (
            children.enter_context(Child(role, command, env, events))
            for role, command in (
                ("wsync watch", ["-m", "wsync", "watch", spec, directory, "--log-format", "json"]),
                ("policy process", [str(CARTPOLE / "play.py")]),
                ("trainer", [str(CARTPOLE / "train.py"), directory, *times]),
            )
        )
        limit = time.monotonic() + LIMIT
        learned = False
        while not stop.is_set() and time.monotonic() < limit:
            try:
                role, event = events.get(timeout=0.1)
            except queue.Empty:
                role, event = "", {}
            if role == "wsync watch":
                board.note(event)
            else:
                board.take(event)
            if board.rows:
                row = board.latest
                mean = "" if row.mean is None else f", mean return {row.mean:.1f}"
                status.update(f"version {row.version}, episodes {len(row.returns)}{mean}")
            for child in (watch, policy, trainer):
                ended = child.process.poll()
                if ended or (ended == 0 and child is not trainer):
                    raise ChildFailed(child.last_words())
            if trainer.process.returncode == 0 and not learned:
                learned, limit = True, min(limit, time.monotonic() + GRACE)
            if learned and board.finished():
                break
    if board.rows:
        board.show(board.latest)


def main() -> int:
    console = Console(highlight=False)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    env = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
    board = Board(console)
    console.print("Starting a trainer, wsync watch and a policy process: some 40 seconds.\n")
    console.print(f"{'version':>7} {'step':>7} {'episodes':>9} {'mean return':>12}")
    with (
        tempfile.TemporaryDirectory(prefix="wsync-quickstart-") as work,
        tempfile.TemporaryDirectory(prefix="wsync-quickstart-", dir=memory) as runtime,
    ):
        env |= {"WSYNC_RUNTIME_DIR": runtime, "WSYNC_STATE_DIR": f"{work}/state"}
        checkpoints = Path(work, "checkpoints")
        checkpoints.mkdir()
        try:
            run(board, env, checkpoints, stop)
        except ChildFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    if stop.is_set():
        print("stopped", file=sys.stderr)
        return 130
    console.print()
    return 0 if board.close() else 1


if __name__ == "__main__":
    sys.exit(main())
