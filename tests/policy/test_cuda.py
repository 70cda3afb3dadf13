"""What is asked of CUDA, in which order and on which stream: with its calls recorded, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from wsync.errors import OutOfDeviceMemory
from wsync.policy.gpu.cuda import Cuda


class Cudart:
    """The runtime's calls, which answer with a code."""

    def __init__(self, calls: list[Any], code: int) -> None:
        self._calls, self._code = calls, code

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self._calls.append(("register", address, nbytes, flags))
        return self._code

    def cudaHostUnregister(self, address: int) -> int:
        self._calls.append(("unregister", address))
        return self._code

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of CUDA, in its order."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and self.name == other.name

        def __hash__(self) -> int:
            return hash(self.name)

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            calls.append(f"waited for {self.name}")

    class Event:
        def record(self, stream: Stream) -> None:
            calls.append(f"event on {stream.name}")

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        calls.append(f"on {getattr(stream, 'name', stream)}")
        try:
            yield
        finally:
            calls.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("policy"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: calls[-1:] == [f"on {torch.device('cpu')}"])
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(calls, 0))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(f"kept for {stream.name}"))
    return calls


@pytest.fixture
def cuda(calls: list[Any]) -> Cuda:
    return Cuda(torch.device("cpu"))


def test_a_copy_aside_waits_for_the_policy_and_not_the_policy_for_it(calls: list[Any], cuda: Cuda) -> None:
    """The side stream waits for what may still read the buffer, and carries the copy and the event behind it."""
    target = cuda.empty(3)
    cuda.send([target], [torch.ones(3, dtype=torch.uint8)], aside=True)
    assert calls == ["side waits for policy", "on side", "event on side", "off"]
    assert target.tolist() == [1, 1, 1]


def test_a_buffer_is_kept_for_the_stream_that_the_policy_went_to(
    calls: list[Any], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed, it is used anew only when what that stream read of it is done."""
    target, policy_stream = cuda.empty(3), torch.cuda.current_stream(torch.device("cpu"))
    other = type(policy_stream)("other")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    cuda.send([target], [torch.ones(3, dtype=torch.uint8)], aside=True)
    assert calls[:2] == ["side waits for other", "kept for other"]


@pytest.mark.parametrize(("aside", "stream"), [(True, "side"), (False, "policy")])
def test_a_copy_that_is_cut_short_is_waited_for(
    calls: list[Any], cuda: Cuda, monkeypatch: pytest.MonkeyPatch, aside: bool, stream: str
) -> None:
    """Interrupted before its event there is no other way to know that nothing reads the slot any more."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda.Event, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cuda.send([torch.zeros(3)], [torch.ones(3)], aside=aside)
    assert calls[-2:] == [f"waited for {stream}", "off"]


def test_a_copy_without_staging_is_on_the_policys_stream(calls: list[Any], cuda: Cuda) -> None:
    """Between two steps, as every kernel of the policy, it needs to wait for nothing."""
    cuda.send([torch.zeros(3)], [torch.ones(3)], aside=False)
    assert calls == ["on policy", "event on policy", "off"]


def test_a_buffer_is_memory_of_the_policys_stream(calls: list[Any], cuda: Cuda) -> None:
    """It has no mark of another stream, with which a forked child would end where it lets go of it."""
    assert cuda.empty(5).numel() == 5
    assert calls == []


def test_capture_is_asked_of_the_policys_device(cuda: Cuda) -> None:
    """The stream that is current there, not on whichever device is current."""
    assert cuda.capturing()


def test_a_full_device_is_one_error(calls: list[Any], cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it would have taken, what is free, and what to do."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(OutOfDeviceMemory, match=r'takes 5 bytes, 7 are free.*staging="none"'):
        cuda.empty(5)


def test_memory_is_locked_with_its_flags(calls: list[Any], cuda: Cuda) -> None:
    """For all devices, as read-only where it is mapped so; and let go of."""
    assert cuda.lock(4096, 10, read_only=True) == "" and cuda.lock(8192, 10, read_only=False) == ""
    assert cuda.unlock(4096)
    assert [call for call in calls if isinstance(call, tuple)] == [
        ("register", 4096, 10, 9),  # cudaHostRegisterPortable | cudaHostRegisterReadOnly
        ("register", 8192, 10, 1),
        ("unregister", 4096),
    ]


def test_a_device_that_failed_unlocks_in_silence(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is unlocked where its last holder goes, and nobody is there to catch an error."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "device", fail)
    assert not cuda.unlock(4096)


def test_a_refused_lock_is_told_and_its_error_forgotten(
    calls: list[Any], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime keeps the error for the next launch, and that one must be ours."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(calls, 801))
    launched = []

    def fill(tensor: torch.Tensor, value: float) -> None:
        launched.append(value)
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    assert cuda.lock(4096, 10, read_only=True) == "error 801"
    assert not cuda.unlock(4096)
    assert len(launched) == 2
