"""A policy on a real GPU, where there is one; and the script that measures it, which also runs where there is none."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import TESTS, marks
from policies import Tied, every_dtype, mlp
from processes import DEADLINE, Spawn
from safetensors.torch import save_file
from torch import nn
from trainers import Trainer, addresses, leased

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import OutOfDeviceMemory, UsageError
from wsync.layout.layout import layout_of
from wsync.policy import attaching
from wsync.policy import reader as reading
from wsync.policy.gpu.cuda import Cuda
from wsync.policy.gpu.transfer import lock_slot
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

pytestmark = pytest.mark.slow

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} finds no CUDA device here")
gpus = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(
    gpus < 2, reason=f"torch {torch.__version__} finds {gpus} CUDA devices here: it takes two"
)
WAYS = [("swap", "device"), ("copy", "device"), ("copy", "none")]


def wide() -> nn.Sequential:
    """16 MiB, so that a copy over the bus takes its time."""
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).eval()


@pytest.fixture
def trainer(runtime: Path) -> Trainer:
    """A segment for ``wide`` whose version 1 has the mark 1."""
    trainer = Trainer(wide)
    trainer.push(1)
    return trainer


@gpu
@pytest.mark.parametrize(("mode", "staging"), WAYS)
def test_a_policy_on_a_gpu_is_kept_in_step(trainer: Trainer, mode: reading.Mode, staging: attaching.Staging) -> None:
    """Attached with the same line it gets each version whole; in copy its addresses stay."""
    policy = wide().cuda()
    before = addresses(policy)
    with wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        for mark in range(2, 9):
            trainer.push(mark)
            while not reader.refresh():
                assert marks(policy) == {float(mark - 1)}
                assert reader.wait(DEADLINE)
            assert marks(policy) == {float(mark)} and (reader.version, reader.step) == (mark, mark)
        assert leased(trainer.segment) == []
        if mode == "copy":
            assert addresses(policy) == before
    assert marks(policy) == {8.0} and next(policy.parameters()).is_cuda


@gpu
@pytest.mark.parametrize(("mode", "staging"), WAYS)
def test_every_weight_gets_its_own_bytes_on_a_gpu(
    runtime: Path, tmp_path: Path, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """Random weights of several dtypes, buffers and tied ones arrive each in its own tensor, and ties stay."""
    trained, policy = Tied().eval(), Tied().eval().cuda()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    segment = WritableSegment.create("nets", layout_of(policy))
    save_file({k: v for k, v in trained.state_dict().items() if k != "head.weight"}, tmp_path / "weights.safetensors")
    with segment.publishing(), Checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        publish(segment, checkpoint)
    with wsync.attach(policy, "nets", mode=mode, staging=staging):
        assert policy.head.weight is policy.embedding.weight
        for name, tensor in trained.state_dict().items():
            assert torch.equal(policy.state_dict()[name].cpu(), tensor), name


@gpu
@pytest.mark.parametrize(("mode", "staging"), WAYS)
def test_every_dtype_of_a_checkpoint_arrives_on_a_gpu(
    runtime: Path, tmp_path: Path, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """Also those for which torch has few kernels: small floats, unsigned integers."""
    trained, policy = every_dtype(1), every_dtype(5).cuda()
    segment = WritableSegment.create("nets", layout_of(policy))
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    with segment.publishing(), Checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        publish(segment, checkpoint)
    with wsync.attach(policy, "nets", mode=mode, staging=staging):
        for name, tensor in trained.state_dict().items():
            assert policy[name].cpu().tolist() == tensor.tolist(), name


@gpu
def test_the_slots_pages_are_locked(trainer: Trainer) -> None:
    """The driver takes the slots' mappings, as read-only or as the owner's, and later versions show in them."""
    locked = [lock_slot(trainer.segment, slot, Cuda(torch.device("cuda:0"))) for slot in range(3)]
    assert [slot.hindrance for slot in locked] == ["", "", ""]
    assert all(slot.weights.is_pinned() for slot in locked)
    policy = wide().cuda()
    with wsync.attach(policy, "nets") as reader:
        for mark in range(2, 9):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}


@gpu
def test_an_error_of_locking_is_not_the_next_kernels() -> None:
    """Memory that cannot be locked is told, and no later launch is blamed for it."""
    device = Cuda(torch.device("cuda:0"))
    assert device.lock(4096, 4096, read_only=True)
    assert torch.ones(3, device="cuda").sum().item() == 3


@gpu
@pytest.mark.parametrize("staging", ["device", "none"])
def test_a_cuda_graph_sees_each_version_whole(trainer: Trainer, staging: attaching.Staging) -> None:
    """A graph captured before attach replays on the addresses that it remembers, queued ahead of the device."""
    policy = wide().cuda()
    look = graph_of(policy)
    with wsync.attach(policy, "nets", staging=staging) as reader:
        for mark in range(2, 12):
            trainer.push(mark)
            seen = []
            while reader.version < mark:
                reader.refresh()
                seen.append((reader.step, look()))
            for step, found in seen:
                assert set(found.flatten().tolist()) == {float(step or 0)}


def graph_of(policy: nn.Module) -> Callable[[], torch.Tensor]:
    def extremes() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([torch.stack(tuple(p.aminmax())) for p in policy.parameters()])

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        extremes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = extremes()

    def replay() -> torch.Tensor:
        graph.replay()
        return out.clone()

    return replay


class Look(nn.Module):
    """The least and the greatest weight of each parameter of a policy, as ``[parameters, 2]``."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self) -> torch.Tensor:
        return torch.stack([torch.stack(torch.aminmax(p)) for p in self.policy.parameters()])


def compiled(policy: nn.Module) -> Callable[[], torch.Tensor]:
    look: Callable[[], torch.Tensor] = torch.compile(Look(policy), mode="reduce-overhead")

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return look().clone()

    for _ in range(3):  # it warms up, records, and replays
        step()
    return step


@gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("staging", ["device", "none"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_policy_sees_each_version_whole(trainer: Trainer, staging: attaching.Staging, when: str) -> None:
    """With torch.compile(mode="reduce-overhead"), before attach or after, it runs on the addresses that stay."""
    pytest.importorskip("triton", reason="torch.compile needs triton for a GPU")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    policy = wide().cuda()
    look = compiled(policy) if when == "before" else None
    with wsync.attach(policy, "nets", staging=staging) as reader:
        look = look or compiled(policy)
        assert not counters["inductor"]["cudagraph_skips"]
        for mark in range(2, 12):
            trainer.push(mark)
            seen = []
            while reader.version < mark:
                reader.refresh()
                seen.append((reader.step, look()))
            for step, found in seen:
                assert set(found.flatten().tolist()) == {float(step or 0)}
    torch._dynamo.reset()


@gpu
def test_a_refresh_in_a_capture_is_refused(trainer: Trainer) -> None:
    """It says so, and leaves both the capture and the copy under way whole."""
    policy, one = wide().cuda(), torch.ones(1, device="cuda")
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        assert not reader.refresh() and (one + 1).item() == 2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = one + 1
            with pytest.raises(UsageError, match="between replays"):
                reader.refresh()
        graph.replay()
        assert out.item() == 2
        assert reader.refresh(wait=True) and marks(policy) == {2.0}


@gpu
@pytest.mark.parametrize(("mode", "staging"), WAYS)
def test_there_is_one_more_copy_on_a_gpu_and_no_third(
    trainer: Trainer, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """Of the weights, none without staging; nor does torch keep the policy's first weights from other processes."""
    gc.collect()
    torch.cuda.empty_cache()
    before, nbytes = torch.cuda.memory_reserved(), trainer.segment.layout.nbytes
    policy = wide().cuda()
    with wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}
            torch.cuda.empty_cache()  # what the look at the marks took
            most = nbytes * (2 if staging == "device" else 1) + (12 << 20)  # torch takes segments of 20 MiB
            assert torch.cuda.memory_reserved() - before < most


@gpu
def test_a_full_gpu_is_told(trainer: Trainer) -> None:
    """Without room for a second copy attach says so, with the way out, which works, and the GPU goes on."""
    policy = wide().cuda()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        with pytest.raises(OutOfDeviceMemory, match='staging="none"'):
            wsync.attach(policy, "nets")
        with wsync.attach(policy, "nets", staging="none"):
            assert marks(policy) == {1.0}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@gpu
def test_a_policy_that_was_moved_off_the_gpu_is_told(trainer: Trainer) -> None:
    """After .cpu(), or onto a GPU, a new version is refused with the reason."""
    there, here = wide().cuda(), wide()
    with wsync.attach(there, "nets") as first, wsync.attach(here, "nets") as second:
        there.cpu()
        here.cuda()
        trainer.push(2)
        for reader in (first, second):
            with pytest.raises(UsageError, match="attach again"):
                reader.refresh()


@gpu
def test_a_split_policy_is_copied_tensor_by_tensor(trainer: Trainer) -> None:
    """A policy with a part on the GPU is kept in step without a buffer, and told when another part follows."""
    policy = wide()
    policy[0].cuda()
    with wsync.attach(policy, "nets") as reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh() and reader.mode == "copy" and marks(policy) == {float(mark)}
        policy.cuda()
        trainer.push(7)
        with pytest.raises(UsageError, match="attach again"):
            reader.refresh()


@two_gpus
def test_a_policy_over_two_gpus(trainer: Trainer) -> None:
    """With its parts on two devices and on the host it is kept in step, each part where it is."""
    policy = wide()
    policy[0].cuda(0)
    policy[1].cuda(1)
    places = [tensor.device for tensor in policy.parameters()]
    with wsync.attach(policy, "nets") as reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh() and reader.mode == "copy" and marks(policy) == {float(mark)}
        assert [tensor.device for tensor in policy.parameters()] == places


@two_gpus
@pytest.mark.parametrize(("mode", "staging"), WAYS)
def test_a_gpu_that_is_not_the_current_one(trainer: Trainer, mode: reading.Mode, staging: attaching.Staging) -> None:
    """All is asked of the policy's own device, beside a policy on the other one that shares the locked slots."""
    policy, other = wide().cuda(1), wide().cuda(0)
    with (
        wsync.attach(policy, "nets", mode=mode, staging=staging) as reader,
        wsync.attach(other, "nets", mode=mode, staging=staging) as beside,
    ):
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}
            assert beside.refresh(wait=True) and marks(other) == {float(mark)}
        assert {tensor.device.index for tensor in policy.parameters()} == {1}
        assert torch.cuda.current_device() == 0


@gpu
def test_several_policies_and_processes_on_one_gpu(trainer: Trainer, spawn: Spawn) -> None:
    """Two policies of one process, and another process, each have the version that they took."""
    script = (
        "import wsync\n"
        "from builders import marks\n"
        "from test_gpu import wide\n"
        "policy = wide().cuda()\n"
        "with wsync.attach(policy, 'nets') as reader:\n"
        "    print(marks(policy), flush=True)\n"
        "    input()\n"
        "    assert reader.refresh(wait=True)\n"
        "    print(marks(policy), flush=True)\n"
    )
    process = spawn("-c", script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "{1.0}\n"
    one, other = wide().cuda(), wide().cuda()
    with wsync.attach(one, "nets") as first, wsync.attach(other, "nets", mode="swap") as second:
        trainer.push(2)
        assert first.refresh(wait=True) and (marks(one), marks(other)) == ({2.0}, {1.0})
        assert second.refresh(wait=True) and marks(other) == {2.0}
        out, err = process.communicate("go\n", timeout=DEADLINE)
        assert out == "{2.0}\n", err


@gpu
def test_a_forked_child_is_told_on_a_gpu(trainer: Trainer, spawn: Spawn) -> None:
    """Forked while a copy is under way, the child's reader says that CUDA does not go through a fork, and is let go of
    without ending the child; the parent's goes on.
    """
    script = (
        "import gc, os, wsync\n"
        "from builders import marks\n"
        "from test_gpu import wide\n"
        "from wsync.errors import UsageError\n"
        "policy = wide().cuda()\n"
        "reader = wsync.attach(policy, 'nets')\n"
        "print('attached', flush=True)\n"
        "input()\n"
        "assert not reader.refresh()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    try: reader.refresh()\n"
        "    except UsageError: pass\n"
        "    else: os._exit(1)\n"
        "    reader.close()\n"
        "    del reader\n"
        "    gc.collect()\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "assert reader.refresh(wait=True) and marks(policy) == {2.0}\n"
        "reader.close()\n"
        "print('done')\n"
    )
    process = spawn("-c", script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    trainer.push(2)
    out, err = process.communicate("go\n", timeout=DEADLINE)
    assert out == "done\n", err


@gpu
def test_a_process_that_ends_under_a_copy_on_a_gpu(trainer: Trainer, spawn: Spawn) -> None:
    """It ends as any other, says nothing, and leaves no lease and no record."""
    script = (
        "import wsync\n"
        "from test_gpu import wide\n"
        "reader = wsync.attach(wide().cuda(), 'nets')\n"
        "print('attached', flush=True)\n"
        "input()\n"
        "assert not reader.refresh()\n"
    )
    process = spawn("-c", script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    trainer.push(2)
    _, err = process.communicate("go\n", timeout=DEADLINE)
    assert (process.returncode, err) == (0, "")
    assert leased(trainer.segment) == [] and trainer.segment.readers() == []


# --- the script that measures


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the script would measure it")
def test_measuring_without_a_gpu_is_one_message(runtime: Path) -> None:
    """Where there is no GPU the script says so, and what to do."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "measure/gpu.py")], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "no CUDA device" in done.stderr and done.stderr.count("\n") == 1


def test_measuring_can_be_rehearsed(runtime: Path) -> None:
    """The lines that measure run on the CPU from end to end, see no torn step, and leave nothing behind."""
    before = set(Path("/dev/shm").glob("wsync-measure-*"))
    done = subprocess.run(
        [sys.executable, str(TESTS / "measure/gpu.py"), "--rehearse"], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "none: a rehearsal"
    figures = found["figures"]
    assert len(figures) == 13
    assert figures["compiled, mode copy"]["wrong"] == 0
    assert all(figure["torn"] == 0 for name, figure in figures.items() if name.startswith("torn"))
    assert next(iter(figures.values()))["whole"] is True
    assert set(Path("/dev/shm").glob("wsync-measure-*")) == before


def test_a_policy_without_cuda_has_no_device() -> None:
    """One on the CPU, on a device of another kind, or split over such, is copied to, or swapped, without one."""
    split = mlp()
    split[0].to("meta")
    for policy in (mlp(), mlp().to("meta"), split):
        assert attaching._device_of(policy) is None
