"""What is refused before it is used: names, places, layouts, and files that are not a segment's."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from policies import mlp
from segments import LAYOUT, Push, push, segment

from wsync.errors import LayoutDiffers, SegmentMissing, SegmentUnsafe, UsageError
from wsync.layout.layout import layout_of
from wsync.segment import segment as protocol
from wsync.segment.segment import Segment, segments
from wsync.segment.segment_files import map_control
from wsync.segment.writable import WritableSegment

__all__ = ["push", "segment"]  # fixtures


def test_another_layout_is_refused(segment: WritableSegment, push: Push) -> None:
    """A policy of another architecture is told every tensor that differs, and what is live stays."""
    push(1.0)
    with pytest.raises(LayoutDiffers) as caught:
        WritableSegment.create("nets", layout_of(mlp(hidden=16)))
    rows = {d.name: (d.expected, d.found) for d in caught.value.differences}
    assert rows["0.weight"] == ("F32 [16, 4]", "F32 [8, 4]")
    assert rows.keys() == {"0.weight", "0.bias", "2.weight"}
    assert "wsync rm nets" in str(caught.value) and "F32 [16, 4]" in str(caught.value)
    assert segment.version == 1


@pytest.mark.parametrize("slots", [-1, 0, 1, 65])
def test_impossible_numbers_of_slots_are_refused(runtime: Path, slots: int) -> None:
    """One slot could never be published into; the number is refused before anything is made."""
    with pytest.raises(UsageError, match="slots"):
        WritableSegment.create("nets", LAYOUT, slots=slots)
    assert os.listdir(runtime) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/a", "../a", "a b", "a\n", "a\0b", "\x1b[31m", "-x", "x" * 201, "é" * 101],
)
def test_names_that_could_lead_elsewhere_are_refused(runtime: Path, name: str) -> None:
    """A name is one path component that is safe to print, for making as for opening."""
    with pytest.raises(UsageError):
        WritableSegment.create(name, LAYOUT)
    with pytest.raises(UsageError):
        Segment.open(name)
    assert os.listdir(runtime) == []


def test_missing_segment_is_said_to_be_missing(runtime: Path) -> None:
    """Opening what nobody made is an error of its own, also where the runtime directory is not there."""
    with pytest.raises(SegmentMissing, match="'nets'"):
        Segment.open("nets")
    with pytest.raises(SegmentMissing):
        Segment.open("nets", runtime / "no" / "where")
    assert segments(runtime / "no" / "where") == []


def test_segment_that_is_removed_while_it_is_opened_is_missing(
    segment: WritableSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vanishes between its directory and its first file was removed, and is not called broken."""

    def late(directory: int, *, write: bool) -> mmap.mmap:
        segment.remove()
        return map_control(directory, write=write)

    monkeypatch.setattr(protocol, "map_control", late)
    with pytest.raises(SegmentMissing):
        Segment.open("nets")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *[(file, content) for file in ("control", "layout.json") for content in (b"", b"garbage", bytes(4096))],
        ("control", b"[]"),
        ("layout.json", b"[]"),
        ("layout.json", b"{}"),
    ],
)
def test_what_is_no_segment_is_refused(segment: WritableSegment, file: str, content: bytes) -> None:
    """A directory of the right name with other content is told apart, with the way out."""
    (segment.path / file).write_bytes(content)
    with pytest.raises(SegmentUnsafe, match="wsync rm nets"):
        Segment.open("nets")
