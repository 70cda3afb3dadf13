"""Every error that wsync raises on purpose, as one tree.

Each message has three parts: what happened, to what, and what to do next. The command line prints the message
and exits with the class's ``exit_code``; a library user catches the class.

    WsyncError                      1   the root
    ├── UsageError                  2   an option, a name or a setting is wrong
    │   ├── SpecError               2   the policy spec cannot be used
    │   ├── SwapRefused             2   ``mode="swap"`` is not safe for this policy
    │   └── CopyRefused             2   a tensor's class refuses copies (also a TypeError)
    ├── CheckpointError             1   something is wrong with one checkpoint
    │   ├── CheckpointRejected      65  it can never be published as it is
    │   │   ├── MalformedCheckpoint 65  it is not a safetensors file, or another of its files is malformed
    │   │   ├── WrongDigest         65  its bytes do not match the digest that its writer or its store gives
    │   │   ├── CheckpointMismatch  65  it does not fit the policy
    │   │   │   └── ForeignCheckpoint 65 it shares no name with the policy: another file among the checkpoints
    │   │   ├── NonFiniteWeights    65  it holds NaN or infinity
    │   │   └── GateRejected        65  the user's gate refuses it
    │   ├── IncompleteCheckpoint    66  a file is missing or cut off (65 if a push names this checkpoint)
    │   │   ├── BeingWritten        66  its writer is still at work
    │   │   │   ├── OpenForWriting  66  a process has it open for writing
    │   │   │   └── BeingRewritten  75  it holds files of two saves, or may
    │   │   └── PartialCheckpoint   66  it lacks tensors that are to keep their live values, and nothing is live
    │   ├── NoCheckpoint            66  there is none yet
    │   ├── UnusableBase            1   the base of an adapter does not fit, or is not finite
    │   └── CheckpointChanged       75  it changed while it was read
    ├── StateError                  1   the history or the pin cannot be read or written
    ├── RetryLater                  75  a gate cannot decide yet; a user's gate raises it
    ├── Stale                       75  the policy's weights are older than its reader's ``max_age``
    ├── HalfWritten                 1   a copy failed, and left a policy with weights of two versions
    ├── GroupBroken                 1   a box of the group is gone, or does not answer
    └── SegmentError                1   something is wrong with one segment
        ├── SegmentMissing          1   there is no such segment
        ├── SegmentUnsafe           1   its owner, mode or contents are not those of a segment that can be trusted
        │   └── SegmentDamaged      1   something outside wsync removed or cut a file of it
        ├── LayoutDiffers           1   it holds another architecture
        ├── OutOfSharedMemory       1   there is no room for it
        ├── OutOfDeviceMemory       1   the GPU has no room for a second copy of the weights
        ├── SegmentBusy             75  another publisher holds it, or readers lease every slot that it may have
        └── AttachTimeout           1   it did not get its first version in time (also a TimeoutError)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SHOWN = 20
"""Most rows that a message shows of a table of differences."""


def printable(text: str) -> str:
    """Escapes unprintable characters, which could move a terminal's cursor or colour its text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def on_one_line(text: str, *names: str | None) -> str:
    """Escapes these names wherever a text contains them, because a file name may contain a line break."""
    for name in filter(None, names):
        for part in (name, name.rpartition("/")[2]):
            if not part.isprintable():
                text = text.replace(part, printable(part))
    return text


def harmless(text: str) -> str:
    """As ``printable``, but keeps line breaks."""
    return "\n".join(map(printable, text.split("\n")))


@contextmanager
def parsed() -> Iterator[None]:
    """Converts every error that malformed data may cause in the block into a ValueError."""
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
        exit_code: exit code of a command that ends with this error.
        kind: the kind of error in one word, for metrics and JSON; a subclass that does not set it inherits it.
        differences: one entry for each tensor that does not fit; empty if the error is not about tensors.
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
    """The policy spec cannot be used: it is not found, its own import failed, or it is not a policy."""


def moved(name: str, now: str) -> UsageError:
    """The error for a policy whose tensors were moved or replaced after it was attached."""
    return UsageError(
        f"{name} is another tensor than those that were attached, or was moved (.to(), .half() …): it is now {now}. "
        "The policy keeps what it has. Close this reader, and attach again after such a change."
    )


class SwapRefused(UsageError):
    """``mode="swap"`` is not safe for this policy: it writes to its own weights, or other processes share them."""


class CopyRefused(UsageError, TypeError):
    """A tensor's class refuses a copy of weights."""


class HalfWritten(WsyncError):
    """A copy failed half-way and left the policy with weights of two versions. Build the policy again."""


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
    """Something is wrong with one checkpoint.

    Attributes:
        identity: that of the checkpoint's files; empty if the error occurred before they were opened.
    """

    identity = ""


class CheckpointRejected(WithDifferences, CheckpointError):
    """This checkpoint can never be published as it is."""

    exit_code = 65
    kind = "rejected"


class MalformedCheckpoint(CheckpointRejected):
    """A file breaks the safetensors format; or an index, adapter configuration or list of digests is malformed."""

    kind = "malformed"


class WrongDigest(CheckpointRejected):
    """The bytes of the file do not match the digest that its writer or its store gives."""

    kind = "digest"


class CheckpointMismatch(CheckpointRejected):
    """The tensors of the checkpoint do not fit those of the policy."""

    kind = "mismatch"


class ForeignCheckpoint(CheckpointMismatch):
    """The file shares no tensor name with the policy: it is another file among the checkpoints."""

    kind = "foreign"


class NonFiniteWeights(CheckpointRejected):
    """The checkpoint holds NaN or infinity."""

    kind = "non_finite"


class GateRejected(CheckpointRejected):
    """The user's gate looked at the staged weights and refused them."""

    kind = "gate"


class IncompleteCheckpoint(CheckpointError):
    """A file of the checkpoint is missing or cut off; a writer may still be at work."""

    exit_code = 66
    kind = "incomplete"


class BeingWritten(IncompleteCheckpoint):
    """Its writer is still at work on it, or was a moment ago."""

    kind = "being_written"


class OpenForWriting(BeingWritten):
    """A process has it open for writing."""


class BeingRewritten(BeingWritten):
    """The files are from two saves, or may be, because one save is being written over another."""

    exit_code = 75
    kind = "rewritten"


class PartialCheckpoint(WithDifferences, IncompleteCheckpoint):
    """The checkpoint lacks some tensors, which should keep their live values, but nothing is live yet."""

    kind = "partial"


class NoCheckpoint(CheckpointError):
    """There is no complete checkpoint yet."""

    exit_code = 66
    kind = "none"


class UnusableBase(WithDifferences, CheckpointError):
    """The base of an adapter does not fit the policy, or is not finite; the adapter itself is not rejected."""


class CheckpointChanged(CheckpointError):
    """A file changed while it was read; the bytes read are thrown away."""

    exit_code = 75


class StateError(WsyncError):
    """The history, or the pin, cannot be read or written."""


class RetryLater(WsyncError):
    """A gate cannot decide yet: a later pass tries the same checkpoint again. A user's gate function raises it."""

    exit_code = 75
    kind = "later"


class GroupBroken(WsyncError):
    """The group of boxes broke; torchrun forms another one."""


class Stopped(Exception):
    """A wait ends because this process was asked to stop or to reload its settings. This is not an error."""


class SegmentError(WsyncError):
    """Something is wrong with one segment."""


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
    errno.ENOENT: "Check that it exists",
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
    """The segment cannot be trusted: it is another user's, others may write to its files, or they are damaged."""


class SegmentDamaged(SegmentUnsafe):
    """Something outside wsync removed or cut a file of the segment; its owner's next publish makes the segment anew."""


class LayoutDiffers(WithDifferences, SegmentError):
    """The segment holds another architecture."""


class OutOfSharedMemory(SegmentError):
    """There is no room for the segment: in shared memory, or in what this process may map."""


class OutOfDeviceMemory(SegmentError):
    """The device of the policy has no room for a second copy of its weights."""


class SegmentBusy(SegmentError):
    """Another publisher holds the segment, or readers lease every slot that it may have. Try again later."""

    exit_code = 75


class AttachTimeout(SegmentError, TimeoutError):
    """The segment, or its first version, did not appear in time."""
