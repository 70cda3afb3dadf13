"""Everything that wsync can refuse, as one tree.

Each message has three parts: what happened, to what, and what to do next. The command line prints the message
and exits with the class's ``exit_code``; a library user catches the class.

    WsyncError                      1   the root
    ├── UsageError                  2   an option, a name or a setting is wrong
    │   ├── SpecError               2   the policy spec cannot be used
    │   ├── SwapRefused             2   ``mode="swap"`` is not safe for this policy
    │   └── CopyRefused             2   a tensor's class refuses copies (also a TypeError)
    ├── CheckpointError             1   something about one checkpoint
    │   ├── CheckpointRejected      65  it can never be published as it is
    │   │   ├── MalformedCheckpoint 65  it is not a safetensors file
    │   │   ├── WrongDigest         65  its bytes are not those that its writer's, or its store's, digest names
    │   │   ├── CheckpointMismatch  65  it does not fit the policy
    │   │   │   └── ForeignCheckpoint 65 it shares no name with the policy: another file among the checkpoints
    │   │   ├── NonFiniteWeights    65  it holds NaN or infinity
    │   │   └── GateRejected        65  the user's gate does not want it
    │   ├── IncompleteCheckpoint    66  it ends before its header says (65 where a push names it)
    │   │   ├── BeingWritten        66  its writer is still at work
    │   │   │   ├── OpenForWriting  66  a process has it open for writing
    │   │   │   └── BeingRewritten  75  it holds files of two saves
    │   │   └── PartialCheckpoint   66  the rest is to keep its live values, and nothing is live
    │   ├── NoCheckpoint            66  there is none yet
    │   ├── UnusableBase            1   what an adapter is merged into does not fit, or is not finite
    │   └── CheckpointChanged       75  it changed while it was read
    ├── StateError                  1   the history or the pin cannot be read or written
    ├── RetryLater                  75  a gate cannot tell yet; also for a user's gate to raise
    ├── Stale                       75  the policy's weights are older than its reader's ``max_age``
    ├── HalfWritten                 1   a copy failed, and left a policy with weights of two versions
    ├── GroupBroken                 1   a box of the group is gone, or does not answer
    └── SegmentError                1   something about one segment
        ├── SegmentMissing          1   no such segment
        ├── SegmentUnsafe           1   it is not ours, or not a segment
        │   └── SegmentDamaged      1   something outside wsync removed or cut a file of it
        ├── LayoutDiffers           1   it holds another architecture
        ├── OutOfSharedMemory       1   there is no room for it
        ├── OutOfDeviceMemory       1   the GPU has no room for a second copy of the weights
        ├── SegmentBusy             75  another publisher holds it, or readers every slot that it may have
        └── AttachTimeout           1   it did not get its first version in time (also a TimeoutError)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SHOWN = 20
"""Rows of a table of differences that a message shows."""


def printable(text: str) -> str:
    """Shows characters that could move a terminal's cursor or colour its text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def on_one_line(text: str, *names: str | None) -> str:
    """Escapes these names in a text, so that a line break in a file's name makes no line of its own."""
    for name in filter(None, names):
        for part in (name, name.rpartition("/")[2]):
            if not part.isprintable():
                text = text.replace(part, printable(part))
    return text


def harmless(text: str) -> str:
    """Escapes what a terminal would obey or an encoding would refuse; keeps line breaks."""
    return "\n".join(map(printable, text.split("\n")))


@contextmanager
def parsed() -> Iterator[None]:
    """Turns every error of code that reads malformed data into a ValueError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc!s:.100}") from exc


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of a table of differences: a tensor, what the policy expects, what was found."""

    name: str
    expected: str
    found: str


class WsyncError(Exception):
    """The root of every error that wsync raises on purpose.

    Attributes:
        exit_code: of a command that ends with it.
        kind: the class in one word, for figures; a subclass without a word of its own has its parent's.
        differences: one entry for each tensor that does not fit; empty if the reason is another.
    """

    exit_code = 1
    kind = "failed"
    differences: tuple[Difference, ...] = ()

    @property
    def message(self) -> str:
        """The text without the table of differences."""
        return super().__str__()


class UsageError(WsyncError):
    """An option, a name or a setting is wrong."""

    exit_code = 2


class SpecError(UsageError):
    """The policy spec cannot be used: not found, its own import failed, not a policy."""


def moved(name: str, now: str) -> UsageError:
    """The error for a policy whose tensors were moved or replaced after it was attached."""
    return UsageError(
        f"{name} is another tensor than those that were attached, or was moved (.to(), .half() …): it is now {now}. "
        "The policy keeps what it has. Close this reader, and attach again after such a change."
    )


class SwapRefused(UsageError):
    """``mode="swap"`` is not for a policy that writes to its own weights."""


class CopyRefused(UsageError, TypeError):
    """A tensor's class refuses a copy of weights."""


class HalfWritten(WsyncError):
    """A copy failed half-way and left the policy with weights of two versions. The policy cannot be used any more."""


class Stale(WsyncError):
    """The newest weights that a reader can give its policy are older than its ``max_age``; newer ones may come."""

    exit_code = 75


class WithDifferences(WsyncError):
    """An error about tensors, which its text shows as a table."""

    def __init__(self, message: str, differences: tuple[Difference, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences

    def __str__(self) -> str:
        rows = [("tensor", "expected", "found")]
        rows += [(printable(d.name), d.expected, d.found) for d in self.differences[:SHOWN]]
        if len(rows) == 1:
            return self.message
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        if len(self.differences) > SHOWN:
            lines.append(f"  … and {len(self.differences) - SHOWN} more")
        return "\n".join([self.message, *lines])


class CheckpointError(WsyncError):
    """Something about one checkpoint.

    Attributes:
        identity: of its files, where they had been opened before it was found.
    """

    identity = ""


class CheckpointRejected(WithDifferences, CheckpointError):
    """This checkpoint can never be published as it is."""

    exit_code = 65
    kind = "rejected"


class MalformedCheckpoint(CheckpointRejected):
    """The file breaks the safetensors format."""

    kind = "malformed"


class WrongDigest(CheckpointRejected):
    """The bytes of the file do not match the digest that its writer, or its store, gives."""

    kind = "digest"


class CheckpointMismatch(CheckpointRejected):
    """The tensors of the checkpoint do not fit those of the policy."""

    kind = "mismatch"


class ForeignCheckpoint(CheckpointMismatch):
    """It shares no tensor name with the policy: it is another file among the checkpoints."""

    kind = "foreign"


class NonFiniteWeights(CheckpointRejected):
    """The checkpoint holds NaN or infinity."""

    kind = "non_finite"


class GateRejected(CheckpointRejected):
    """The user's gate looked at the staged weights and does not want them live."""

    kind = "gate"


class IncompleteCheckpoint(CheckpointError):
    """The file ends before its header says it does; a writer may still be at work."""

    exit_code = 66
    kind = "incomplete"


class BeingWritten(IncompleteCheckpoint):
    """Its writer is still at work on it, or was a moment ago."""

    kind = "being_written"


class OpenForWriting(BeingWritten):
    """A process has it open for writing."""


class BeingRewritten(BeingWritten):
    """Its files are of two saves, or may be, because one save is being written over another."""

    exit_code = 75
    kind = "rewritten"


class PartialCheckpoint(WithDifferences, IncompleteCheckpoint):
    """It holds a part of the weights; the rest should keep its live values, but nothing is live yet."""

    kind = "partial"


class NoCheckpoint(CheckpointError):
    """There is no complete checkpoint yet."""

    exit_code = 66
    kind = "none"


class UnusableBase(WithDifferences, CheckpointError):
    """The base of an adapter does not fit the policy, or is not finite; the adapter itself is not rejected."""


class CheckpointChanged(CheckpointError):
    """The file changed while it was read; the bytes read are thrown away."""

    exit_code = 75


class StateError(WsyncError):
    """The history, or the pin, cannot be read or written."""


class RetryLater(WsyncError):
    """A gate cannot tell yet: the same checkpoint is tried again by a later pass. A user's gate function raises it."""

    exit_code = 75
    kind = "later"


class GroupBroken(WsyncError):
    """The group of boxes broke; torchrun forms another one."""


class Stopped(Exception):
    """This process was told to end or to read its settings again, so it stops waiting. This is not an error."""


class SegmentError(WsyncError):
    """Something about one segment."""


_ADVICE = {
    errno.ENOSPC: "Make room there, or name another place",
    errno.EDQUOT: "Make room in this user's quota, or name another place",
    errno.EROFS: "Mount it for writing, or name another place",
    errno.EACCES: "Give this user access to it, or run this as its owner",
    errno.EPERM: "Give this user access to it, or run this as its owner",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`; LimitNOFILE= of its systemd unit)",
    errno.ENFILE: "Raise the machine's limit of open files (`sysctl fs.file-max`)",
    errno.EAGAIN: "Raise the limit of processes (`ulimit -u`; TasksMax= of its systemd unit)",
    errno.ENOMEM: "Raise this process's memory limit (`ulimit -v`; MemoryMax= of its systemd unit)",
    errno.ESTALE: "Mount that network file system anew: its server no longer knows the file",
    errno.EIO: "Look at the disk, or the network file system, below it (`dmesg` tells more)",
    errno.ENOENT: "See that it is there",
}


def remedy(exc: OSError) -> str:
    """What to do about an OSError, as a sentence without its full stop."""
    return _ADVICE.get(exc.errno or 0, "Look at what it names, its mount, and the limits of this process")


def from_os_error(exc: OSError, path: os.PathLike[str]) -> SegmentError:
    """Converts an OSError at a segment, or its directory, into a SegmentError that names the path."""
    what = f" ({exc.filename})" if exc.filename else ""
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    return SegmentError(
        f"OS error at {os.fspath(path)}: {reason}{what}. {remedy(exc)}; nothing is lost, and the next pass tries again."
    )


class SegmentMissing(SegmentError):
    """There is no segment of this name."""


class SegmentUnsafe(SegmentError):
    """The directory at the segment's path is not a segment of this user."""


class SegmentDamaged(SegmentUnsafe):
    """Something outside wsync removed a file of the segment, or cut one; its owner's next publish makes it anew."""


class LayoutDiffers(WithDifferences, SegmentError):
    """The segment holds another architecture."""


class OutOfSharedMemory(SegmentError):
    """The shared memory has no room for the segment."""


class OutOfDeviceMemory(SegmentError):
    """The device of the policy has no room for a second copy of its weights."""


class SegmentBusy(SegmentError):
    """Try later: another publisher holds the segment, or readers lease every slot that it may have."""

    exit_code = 75


class AttachTimeout(SegmentError, TimeoutError):
    """The segment, or its first version, did not come in time."""
