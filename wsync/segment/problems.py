"""The errors about a segment: each names it and says what to do."""

from __future__ import annotations

from ..errors import SegmentBusy, SegmentDamaged, SegmentUnsafe


def removed(name: str) -> SegmentBusy:
    return SegmentBusy(f"segment {name!r} was just removed. Try again: the next publish makes it anew.")


def damaged(name: str, how: str) -> SegmentDamaged:
    return SegmentDamaged(
        f"segment {name!r} {how}: something outside wsync removed or cut its files (systemd's RemoveIPC, a "
        f"cleaner of temporary files). Publish again, which makes it anew, or `wsync rm {name}`."
    )


def broken(name: str, how: str) -> SegmentUnsafe:
    return SegmentUnsafe(f"segment {name!r} {how}. Remove it with `wsync rm {name}`, and publish again.")
