"""The child of ``test_faults.py``: one Python under ``faults.c`` that passes hundreds of times, a fault in each.

    LD_PRELOAD=faults.so python faulty.py CHECKPOINTS RUNTIME LAYOUT SCENARIO

For each scenario it first counts the calls of a pass, then fails each of them in each way, and every time looks whether
what was live is still live and whole, and whether the next pass, without a fault, publishes. One JSON object for each
fault goes to stdout. Torch is not imported.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import math
import os
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsync.checkpoints.files import parts, settling
from wsync.discovery.newest import Select
from wsync.errors import SegmentError, WsyncError
from wsync.fitting.fit import Fit
from wsync.layout.layout import Layout
from wsync.segment.segment import Segment
from wsync.segment.segment_files import slot_name
from wsync.settings import layout_process
from wsync.settings.spec import Spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

SCENARIOS = ("push", "watch", "current", "first", "shards", "step", "cast", "dry run", "named", "adapter", "half saved")
SEGMENT = ("push", "watch", "current", "first")  # calls on the segment fail here only: the others make the same ones
SHORT = -1
ERRORS = {  # that Linux returns from each family; from a family that is not here, EIO and ESTALE
    "stat": (errno.EIO, errno.EACCES, errno.ESTALE),
    "open": (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOSPC, errno.EINTR),
    "opendir": (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE),
    "fcntl": (errno.EIO, errno.EACCES, errno.EMFILE, errno.EINTR),
    "flock": (errno.EIO, errno.EINTR),
    "mmap": (errno.EACCES, errno.ENOMEM),
    "mkdir": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "unlink": (errno.EIO, errno.EACCES),
    "fallocate": (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EINTR),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "preadv": (errno.EIO, errno.ESTALE, errno.EINTR),
    "close": (errno.EIO, errno.EINTR),
}
ALWAYS = (errno.EIO, errno.EACCES, errno.ESTALE)  # of every call from the first on
PARTIAL = ("read", "pread", "preadv", "pwrite")
NAME = "nets"


class Faults:
    """What ``faults.c`` offers."""

    def __init__(self, *roots: Path) -> None:
        self.shim = ctypes.CDLL(None)
        self.shim.fault_calls.restype = ctypes.c_char_p
        self.shim.fault_roots(*(os.fsencode(root) for root in roots))

    @contextmanager
    def armed(self, family: str, nth: int, error: int) -> Iterator[list[int]]:
        fired: list[int] = []
        self.shim.fault_arm(family.encode(), nth, error)
        try:
            yield fired
        finally:
            fired.append(self.shim.fault_disarm())

    def calls(self) -> list[str]:
        return str(self.shim.fault_calls().decode()).split()


class Box:
    """Checkpoints that carry a mark, a segment, and what passes over them make of it."""

    def __init__(self, place: Path, runtime: Path, layout: Layout, scenario: str) -> None:
        self.place, self.runtime, self.layout, self.scenario = place, runtime, layout, scenario
        self.mark = 0
        select = Select(settle=0.0, order="step" if scenario == "step" else "mtime")
        fit = Fit(cast=True, base=str(place / ".base.safetensors") if scenario == "adapter" else "")
        self.spec = Spec("policies:mlp", NAME, Path(__file__).parent, select=select, weights=fit)
        self.kept: Syncer | None = None

    def syncer(self) -> Syncer:
        place = self.place / "step.safetensors" if self.scenario == "named" else self.place
        if self.scenario != "watch":
            return Syncer(self.spec, place, runtime=self.runtime)
        self.kept = self.kept or Syncer(self.spec, place, runtime=self.runtime)
        return self.kept

    def prepare(self) -> None:
        """What the next pass is to find."""
        if self.scenario == "first" and (self.runtime / NAME).exists():
            shutil.rmtree(self.runtime / NAME)
        if self.scenario == "current" and self.mark:
            return
        self.mark += 1
        for old in self.place.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if self.scenario == "shards":
            self._write_shards(self.place / f"step_{self.mark}")
        elif self.scenario == "half saved":
            self.finish()
            assert (whole := attempt(self))["status"] == "published", whole
            self.mark += 1
            self._write(self.place / "latest" / "model-00001-of-00002.safetensors", self._names[:2])
        elif self.scenario == "adapter":
            self._write(self.place / ".base.safetensors", [t.name for t in self.layout.tensors])
            self._write_adapter(self.place / f"step_{self.mark}")
        else:
            name = "step" if self.scenario == "named" else f"step_{self.mark}"
            self._write(self.place / f"{name}.safetensors", [t.name for t in self.layout.tensors])

    def finish(self) -> None:
        """Ends a save that is only half done."""
        if self.scenario == "half saved":
            self._write_shards(self.place / "latest")

    @property
    def _names(self) -> list[str]:
        return [tensor.name for tensor in self.layout.tensors]

    def _write(self, path: Path, names: list[str]) -> None:
        code, dtype, size = ("d", "F64", 8) if self.scenario == "cast" else ("f", "F32", 4)
        table: dict[str, Any] = {} if self.scenario == "half saved" else {"__metadata__": {"step": str(self.mark)}}
        numbers = 0
        for tensor in self.layout.tensors:
            if tensor.name in names:
                end = numbers + tensor.nbytes // 4
                offsets = [numbers * size, end * size]
                table[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
                numbers = end
        header = json.dumps(table).encode()
        path.write_bytes(
            struct.pack("<Q", len(header)) + header + struct.pack(f"<{numbers}{code}", *[self.mark] * numbers)
        )
        os.utime(path, (10**9 + self.mark, 10**9 + self.mark))

    def _write_shards(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        halves = {"model-00001-of-00002.safetensors": self._names[:2]}
        shards = halves | {"model-00002-of-00002.safetensors": self._names[2:]}
        for shard, held in shards.items():
            self._write(directory / shard, held)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}}))
        os.utime(index, (10**9 + self.mark, 10**9 + self.mark))

    def _write_adapter(self, directory: Path) -> None:
        """A LoRA adapter of rank 1 that adds nothing to its base."""
        directory.mkdir()
        rows, columns = next(tensor.shape for tensor in self.layout.tensors if tensor.name == "0.weight")
        name = "base_model.model.0.lora_{}.weight"
        table = {
            name.format("A"): {"dtype": "F32", "shape": [1, columns], "data_offsets": [0, 4 * columns]},
            name.format("B"): {"dtype": "F32", "shape": [rows, 1], "data_offsets": [4 * columns, 4 * (columns + rows)]},
        }
        header = json.dumps(table).encode()
        file = directory / "adapter_model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * (columns + rows)))
        os.utime(file, (10**9 + self.mark, 10**9 + self.mark))
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        (directory / "adapter_config.json").write_text(json.dumps(config))

    def live(self) -> tuple[int, list[float]]:
        """The live version, and the distinct values among its weights."""
        try:
            segment = Segment.open(NAME, self.runtime)
        except SegmentError:
            return 0, []
        word, offset = segment.word, segment.data_offset
        segment.close()
        if not word >> 8:
            return 0, []
        data = (self.runtime / NAME / slot_name(word & 0xFF)).read_bytes()[offset:]
        return word >> 8, sorted(set(struct.unpack(f"<{len(data) // 4}f", data)))


def attempt(box: Box, *, publish: bool = False) -> dict[str, Any]:
    """One pass, as a push or a watch makes it."""
    syncer = box.syncer()
    try:
        outcome: Outcome = syncer.once(dry_run=box.scenario == "dry run" and not publish)
        result = {"status": outcome.status, "version": outcome.version, "message": outcome.reason}
    except WsyncError as exc:
        result = {"status": "failed", "raised": type(exc).__name__, "message": str(exc)}
    except Exception:
        result = {"status": "traceback", "message": traceback.format_exc()}
    if syncer is box.kept:
        if segment := syncer.standing.opened:
            segment.unmap()  # as a watch does that hears of nothing
    else:
        try:
            syncer.close()
        except Exception:
            result = {"status": "traceback", "message": traceback.format_exc()}
    return result


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def inject(box: Box, faults: Faults, family: str, nth: int, error: int) -> dict[str, Any]:
    box.prepare()
    before, held = box.live(), descriptors()
    with faults.armed(family, nth, error) as fired:
        result = attempt(box)
    result |= {"before": before, "after": box.live(), "fired": fired[0]}
    if descriptors() > held:
        gc.collect()
    result["leak"] = 0 if box.kept else descriptors() - held
    box.finish()
    result["next"] = attempt(box, publish=True)
    result |= {"final": box.live(), "left": sorted(set(os.listdir(box.runtime)) - {NAME}), "mark": box.mark}
    return result


def main() -> None:
    # Each pass makes the same calls however slow the machine is: none remembers an index, and each finds its files
    # young and looks at them again after a wait, in which nobody writes.
    parts._STEADY, settling._TICK = math.inf, 1.0
    time.sleep = lambda seconds: None
    place, runtime = Path(sys.argv[1]), Path(sys.argv[2])
    layout = Layout.from_json(json.loads(Path(sys.argv[3]).read_text()))
    layout_process.layout_of_spec = lambda spec: layout  # else a process with torch each time
    for scenario in sys.argv[4:]:
        faults = Faults(place, runtime if scenario in SEGMENT else Path("/nowhere"))
        box = Box(place, runtime, replace(layout), scenario)
        shutil.rmtree(runtime / NAME, ignore_errors=True)
        for _ in range(2):  # the second finds a version live, every module imported, every cache filled
            box.prepare()
            with faults.armed("", 1, 0):
                result = attempt(box)
            calls = faults.calls()
        print(json.dumps({"scenario": scenario, "calls": calls, **result}), flush=True)
        for family in sorted(set(calls)):
            errors = (errno.EACCES,) if scenario == "half saved" else ERRORS.get(family, (errno.EIO, errno.ESTALE))
            cases = [(nth, error) for nth in range(1, calls.count(family) + 1) for error in errors]
            cases += [(0, error) for error in ALWAYS]
            cases += [(nth, SHORT) for nth in range(calls.count(family) + 1) if family in PARTIAL]
            for nth, error in cases:
                about = {"scenario": scenario, "family": family, "nth": nth, "error": error}
                for _ in range(10):  # one pass in eight looks at a young file once less: that depends on the clock
                    if (said := inject(box, faults, family, nth, error))["fired"]:
                        break
                print(json.dumps(about | said), flush=True)
        if box.kept:
            box.kept.close()


if __name__ == "__main__":
    main()
