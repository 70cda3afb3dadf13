"""A policy on a device: memory that is refused, locked pages, and every end that can come while a copy is under way."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import marks
from devices import LateDevice
from policies import mlp
from processes import DEADLINE, Spawn
from trainers import Trainer, addresses, leased

import wsync
from wsync.errors import OutOfDeviceMemory, UsageError
from wsync.policy import reader as reading
from wsync.policy import segment_search
from wsync.policy.gpu.reader import DeviceReader
from wsync.segment.writable import WritableSegment


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """A segment for ``mlp`` whose version 1 has the mark 1."""
    trainer.push(1)
    return trainer


def mappings(segment: WritableSegment) -> list[tuple[range, str]]:
    """Where, and how, this process maps slots of a segment."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{segment.path}/slot-" in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((range(begin, end), line.split()[1]))
    return found


# --- page-locked memory


def test_what_is_locked_are_the_slots_own_pages(trainer: Trainer, device: LateDevice) -> None:
    """All slots are locked while attaching, through a shared, read-only mapping: of a private one copies would be."""
    trainer.segment.unmap()
    with wsync.attach(mlp(), "nets"):
        mapped = mappings(trainer.segment)
        assert [how for _, how in mapped] == ["r--s"] * 3
        assert sorted(device.locked) == sorted(where.start for where, _ in mapped)
    assert device.locked == {} and mappings(trainer.segment) == []


def test_policies_of_one_process_lock_a_slot_once(trainer: Trainer, device: LateDevice) -> None:
    """Each policy has its own version and its own buffers; the first locks the slots, the last unlocks."""
    one, other = mlp(), mlp()
    first, second = wsync.attach(one, "nets"), wsync.attach(other, "nets", mode="swap")
    assert device.locks == len(device.locked) == 3
    trainer.push(2)
    assert first.refresh(wait=True) and (marks(one), marks(other)) == ({2.0}, {1.0})
    first.close()
    assert len(device.locked) == 3
    assert second.refresh(wait=True) and marks(other) == {2.0}
    second.close()
    assert device.locked == {} and marks(one) == {2.0}


def test_a_driver_that_locks_nothing_read_only(
    trainer: Trainer, device: LateDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only writable mappings can be locked the segment's owner gets one, and nothing is said."""
    device.refuses = {"read-only"}
    trainer.segment.unmap()
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        assert [how for _, how in mappings(trainer.segment)] == ["rw-s"] * 3 and len(device.locked) == 3
        trainer.push(2)
        assert reader.refresh(wait=True) and marks(policy) == {2.0}
    assert device.locked == {} and not caplog.records


def test_memory_that_may_not_be_locked(
    trainer: Trainer, device: LateDevice, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Where nothing may be locked versions come all the same, by unlocked copies, with one warning that says why."""
    device.refuses = {"read-only", "writable"}
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}
        trainer.segment.remove()
        trainer.segment.close()
        again = Trainer(mlp)
        again.push(7)
        assert reader.refresh(wait=True) and marks(policy) == {7.0}
    (record,) = (record for record in caplog.records if "page-locked" in record.message)
    assert "operation not permitted" in record.message and "ulimit -l" in record.message


def test_memory_that_stays_locked_stays_mapped(trainer: Trainer, device: LateDevice) -> None:
    """Whatever was mapped at its address afterwards, the device would read the old pages there."""
    device.refuses = {"unlock"}
    trainer.segment.unmap()
    wsync.attach(mlp(), "nets").close()
    gc.collect()
    assert sorted(device.locked) == sorted(where.start for where, _ in mappings(trainer.segment)) != []


# --- a full device


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_full_device_is_told_while_attaching(trainer: Trainer, device: LateDevice, mode: reading.Mode) -> None:
    """There is one error, which names the way out, and nothing is left behind; the way out works."""
    device.room = 10
    policy = mlp()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(OutOfDeviceMemory):
        wsync.attach(policy, "nets", mode=mode)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert leased(trainer.segment) == [] and trainer.segment.readers() == [] and device.locked == {}
    with wsync.attach(policy, "nets", staging="none"):
        assert marks(policy) == {1.0}


def test_the_second_buffer_is_there_before_attach_returns(
    trainer: Trainer, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In swap, a device that has room for one buffer only is not found full in the middle of a run."""

    def once(nbytes: int) -> torch.Tensor:
        device.room = 10
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(
        device, "empty", lambda nbytes: LateDevice.empty(device, nbytes) if device.room else once(nbytes)
    )
    policy = mlp()
    with pytest.raises(OutOfDeviceMemory):
        wsync.attach(policy, "nets", mode="swap")
    assert marks(policy) == {1.0} and trainer.segment.readers() == [] and device.locked == {}


def test_a_full_device_leaves_the_old_version_running(
    trainer: Trainer, device: LateDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kept tensor takes the last room, the policy goes on with what it has, and catches up; one warning."""
    monkeypatch.setattr(DeviceReader, "full", 0.0)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        kept = policy.state_dict()
        assert reader.refresh(wait=True)
        device.room = 0
        for mark in (3, 4, 5):
            trainer.push(mark)
            assert not reader.refresh() and not reader.refresh(wait=True)
            assert (reader.version, marks(policy)) == (2, {2.0}) and leased(trainer.segment) == []
        assert [r.message for r in caplog.records if "no room" in r.message and "version 2" in r.message] != []
        assert len(caplog.records) == 1
        assert kept["0.weight"].unique().tolist() == [1.0]
        device.room = None
        assert reader.refresh(wait=True) and marks(policy) == {5.0}


def test_a_full_device_is_not_asked_at_every_step(trainer: Trainer, device: LateDevice) -> None:
    """To ask costs the device its caches: it is asked again after a while, and wait does not spin meanwhile."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        kept = policy.state_dict()
        assert reader.refresh(wait=True)
        device.room = 0
        trainer.push(3)
        assert not reader.refresh()
        device.room = None
        assert not reader.refresh() and not reader.wait(0)
        assert reader.wait(DEADLINE) and reader.refresh(wait=True) and marks(policy) == {3.0}
        del kept


# --- the end


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_close_while_a_copy_is_under_way(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, landed: bool
) -> None:
    """The copy is waited for before its memory is let go of; the policy keeps the version that it has."""
    policy = mlp()
    reader = wsync.attach(policy, "nets", mode=mode)
    trainer.push(2)
    assert not reader.refresh()
    if landed:
        device.land()
    reader.close()
    assert device.flights[-1].done and device.locked == {}
    assert leased(trainer.segment) == [] and trainer.segment.readers() == []
    assert (reader.version, marks(policy)) == (1, {1.0})
    with pytest.raises(UsageError, match="closed"):
        reader.refresh()
    with pytest.raises(UsageError, match="closed"):
        reader.wait(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    assert marks(policy) == {2.0}


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_close_after_the_device_failed(
    trainer: Trainer, device: LateDevice, monkeypatch: pytest.MonkeyPatch, mode: reading.Mode
) -> None:
    """A copy that will never be done holds nothing up: no lease, lock or record is left, and the reader is closed."""
    reader = wsync.attach(mlp(), "nets", mode=mode)
    trainer.push(2)
    assert not reader.refresh()
    device.land()

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(device.flights[-1], "synchronize", fail)
        patch.setattr(device.flights[-1], "query", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            reader.refresh()
        reader.close()
    assert device.locked == {} and leased(trainer.segment) == [] and trainer.segment.readers() == []
    with pytest.raises(UsageError, match="closed"):
        reader.refresh()


def test_a_reader_that_is_dropped_while_a_copy_is_under_way(trainer: Trainer, device: LateDevice) -> None:
    """Without close, too, the copy is waited for; no lease and no lock is left."""
    reader = wsync.attach(mlp(), "nets")
    trainer.push(2)
    assert not reader.refresh()
    del reader
    gc.collect()
    assert device.flights[-1].done and device.locked == {} and leased(trainer.segment) == []


def test_error_while_a_copy_begins(trainer: Trainer, device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's error comes out of refresh, leases nothing and leaves the version; the next refresh tries again."""
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("launch failed")

        with monkeypatch.context() as patch:
            patch.setattr(device, "send", fail)
            with pytest.raises(RuntimeError, match="launch failed") as kept:
                reader.refresh()
        assert kept.tb is not None and leased(trainer.segment) == [] and marks(policy) == {1.0}
        assert reader.refresh(wait=True) and marks(policy) == {2.0}


def test_a_swap_that_is_cut_short(trainer: Trainer, device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, the policy is made whole by the next version to come, and no buffer that it uses is written."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        assert not reader.refresh()
        device.land()
        targets = reader._weights._targets  # type: ignore[attr-defined]

        def interrupted() -> Iterator[tuple[torch.Tensor, int]]:
            yield targets[0]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(reader._weights, "_targets", interrupted())  # type: ignore[attr-defined]
            with pytest.raises(KeyboardInterrupt):
                reader.refresh()
        assert not reader.refresh()
        (written,) = device.flights[-1].targets
        place = range(written.data_ptr(), written.data_ptr() + written.numel())
        assert not any(address in place for address in addresses(policy))
        device.land()
        assert reader.refresh() and marks(policy) == {2.0}


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_landing_that_is_cut_short(
    trainer: Trainer, device: LateDevice, monkeypatch: pytest.MonkeyPatch, mode: reading.Mode
) -> None:
    """Interrupted before it is given to the policy, the version that is there is given by the next refresh."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        trainer.push(2)
        assert not reader.refresh()
        device.land()
        weights = reader._weights  # type: ignore[attr-defined]
        landed = weights.landed

        def interrupted(*, wait: bool) -> bool:
            assert landed(wait=wait)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(weights, "landed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reader.refresh()
        assert marks(policy) == {1.0}
        assert reader.refresh() and marks(policy) == {2.0} and leased(trainer.segment) == []


def test_a_process_that_ends_under_a_copy(trainer: Trainer, spawn: Spawn) -> None:
    """It ends as any other, says nothing, and leaves no lease and no record."""
    script = (
        "import wsync\n"
        "from devices import LateDevice\n"
        "from policies import mlp\n"
        "from wsync.policy import attaching\n"
        "device = LateDevice()\n"
        "attaching._device_of = lambda policy: device\n"
        "reader = wsync.attach(mlp(), 'nets')\n"
        "print('attached', flush=True)\n"
        "input()\n"
        "assert not reader.refresh()\n"
    )
    process = spawn("-c", script, stdin=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    trainer.push(2)
    _, err = process.communicate("go\n", timeout=DEADLINE)
    assert (process.returncode, err) == (0, "")
    assert leased(trainer.segment) == [] and trainer.segment.readers() == []


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_segment_that_is_made_anew(trainer: Trainer, device: LateDevice, mode: reading.Mode) -> None:
    """Removed under a copy that is under way, the old version still lands; then the new segment's slots are locked."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        trainer.push(2)
        assert not reader.refresh()
        trainer.segment.remove()
        trainer.segment.close()
        device.land()
        assert reader.refresh() and marks(policy) == {2.0}
        assert not reader.refresh()
        again = Trainer(mlp)
        again.push(3)
        assert reader.wait(DEADLINE)
        assert reader.refresh(wait=True) and (reader.version, marks(policy)) == (1, {3.0})
        assert len(device.locked) == 3 and device.locks == 6


def test_a_segment_is_not_left_under_a_copy(trainer: Trainer, device: LateDevice) -> None:
    """Who looks for another segment meanwhile, as a waiting thread does, leaves the pages that the bus reads locked."""
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        assert not reader.refresh()
        old = set(device.locked)
        trainer.segment.remove()
        trainer.segment.close()
        Trainer(mlp).push(3)
        reader._find_again()
        assert set(device.locked) == old
        device.land()
        assert reader.refresh() and marks(policy) == {2.0}
        assert reader.refresh(wait=True) and marks(policy) == {3.0}


def test_a_new_segment_that_lacks_a_slot(
    trainer: Trainer, device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken, and once it is whole its own weights come, not those of the slots that were locked before."""
    monkeypatch.setattr(segment_search.Search, "seconds", 0.0)
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        trainer.segment.remove()
        trainer.segment.close()
        again = Trainer(mlp)
        again.push(3)
        slot = again.segment.path / "slot-2.safetensors"
        aside = slot.rename(slot.with_name("aside"))
        assert not reader.refresh(wait=True) and marks(policy) == {1.0}
        aside.rename(slot)
        assert reader.refresh(wait=True) and marks(policy) == {3.0}


def test_a_segment_that_was_deleted_by_hand(
    trainer: Trainer, device: LateDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """It is warned of once, and the policy goes on."""
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        shutil.rmtree(trainer.segment.path)
        assert not reader.wait(0)
        assert not reader.refresh() and marks(policy) == {1.0}
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@pytest.mark.slow
def test_a_forked_child_is_told(trainer: Trainer, spawn: Spawn) -> None:
    """CUDA does not go through a fork: the child's reader says so and touches nothing of CUDA's, to the child's very
    end, and the parent goes on.
    """
    script = (
        "import gc, os, wsync\n"
        "from builders import marks\n"
        "from devices import LateDevice\n"
        "from policies import mlp\n"
        "from trainers import leased\n"
        "from wsync.policy import attaching\n"
        "from wsync.errors import UsageError\n"
        "from wsync.segment.writable import WritableSegment\n"
        "device = LateDevice()\n"
        "attaching._device_of = lambda policy: device\n"
        "policy = mlp()\n"
        "reader = wsync.attach(policy, 'nets')\n"
        "segment = WritableSegment.open('nets')\n"
        "print('attached', flush=True)\n"
        "input()\n"
        "assert not reader.refresh() and len(leased(segment)) == 1\n"
        "del device.flights[:-1]\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    for act in (reader.refresh, reader.wait):\n"
        "        try: act()\n"
        "        except UsageError as exc: assert 'fork' in str(exc)\n"
        "        else: os._exit(1)\n"
        "    reader.close()\n"
        "    del reader, act\n"
        "    gc.collect()\n"
        "    assert not device.flights[-1].done and len(device.locked) == 3\n"
        "    assert marks(policy) == {1.0} and [r.pid for r in segment.readers()] == [os.getppid()]\n"
        "    device.flights.clear()\n"
        "    raise SystemExit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "assert [r.pid for r in segment.readers()] == [os.getpid()] and len(leased(segment)) == 1\n"
        "device.land()\n"
        "assert reader.refresh() and marks(policy) == {2.0} and leased(segment) == []\n"
        "reader.close()\n"
        "print('done')\n"
    )
    process = spawn("-c", script, stdin=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    trainer.push(2)
    out, err = process.communicate("go\n", timeout=DEADLINE)
    assert out == "done\n", err


def test_a_policy_on_the_cpu_imports_nothing_of_it(trainer: Trainer, spawn: Spawn) -> None:
    """Who has no policy on a GPU pays nothing: none of these modules is loaded, and no CUDA is begun."""
    script = (
        "import sys, torch, wsync\n"
        "from policies import mlp\n"
        "with wsync.attach(mlp(), 'nets') as reader: reader.refresh()\n"
        "gpu = 'wsync.policy.gpu'\n"
        "print([m for m in sys.modules if m.startswith(gpu)], torch.cuda.is_initialized())\n"
    )
    out, err = spawn("-c", script).communicate(timeout=DEADLINE)
    assert out == "[] False\n", err
