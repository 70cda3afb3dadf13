"""What a pass costs besides time, in counts that do not jitter."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsync.bench.cases import Slot
from wsync.bench.rows import Settings
from wsync.bench.workspace import Workspace, private_workspace
from wsync.fitting import header
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer


@pytest.fixture
def workspace(runtime: Path, tmp_path: Path) -> Iterator[Workspace]:
    with private_workspace(Settings(directory=tmp_path, runtime=runtime)) as made:
        yield made


def test_a_staged_file_is_read_once_and_takes_no_memory(workspace: Workspace) -> None:
    """Guards the slot as the only copy: no byte of 64 MiB is read twice, and less than 1 MiB is allocated."""
    slot = Slot(workspace, workspace.save("x.safetensors", 64 << 20, 200))
    slot.stage(finite=True)  # so that what is imported late is there
    before = bytes_read()
    slot.stage(finite=True)
    assert bytes_read() - before < 65 << 20
    tracemalloc.start()
    try:
        slot.stage(finite=True)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_pass_is_not_searched_for_garbage(workspace: Workspace, layouts_here: None) -> None:
    """Guards a first pass that is linear in tensors: the collector looks at their tables neither once nor often."""
    spec = load_spec(str(workspace.write_spec("policy", 1 << 20, 3000)))
    workspace.save("policy/step_1.safetensors", 1 << 20, 3000)
    header._table.cache_clear()
    collected: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        with Syncer(spec, runtime=workspace.runtime) as syncer:
            assert syncer.once().status == "published"
            assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)
    assert len(collected) <= 4  # before and after the pass


def bytes_read() -> int:
    """Bytes that read calls of this process gave."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])
