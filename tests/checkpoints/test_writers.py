"""Real writers: what the libraries that people train with write is read, and what copies at work write is not torn."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import policies
import pytest
import torch
from builders import SUPPORT, write
from processes import DEADLINE
from safetensors.torch import save_file, save_model
from torch import nn

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.discovery.listing import scan
from wsync.discovery.newest import Select
from wsync.errors import WsyncError
from wsync.fitting.fit import Fit
from wsync.layout.filenames import ADAPTER, INDEX, SINGLE
from wsync.layout.layout import layout_of, named_tensors
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec
from wsync.sync.loop import run
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

HIDDEN = 50_000  # units: 1.4 MB of weights, so that a copy takes a while


def assert_fits(path: Path, model: nn.Module, settings: Fit = Fit()) -> None:  # noqa: B008  (frozen)
    """A checkpoint of a model reaches the model's own layout, to the bit."""
    layout = layout_of(model)
    weights = bytearray(b"\xa5" * layout.nbytes)
    with Checkpoint(path) as checkpoint:
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, settings))
    own = dict(named_tensors(model))
    for entry in layout.tensors:
        bits = own[entry.name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert weights[entry.offset : entry.offset + entry.nbytes] == bits, entry.name


def shards(path: Path) -> int:
    """How many files an index names; all of them are there."""
    files = set(json.loads((path / INDEX).read_text())["weight_map"].values())
    assert files <= {file.name for file in path.iterdir()}
    return len(files)


# Libraries


def test_a_tied_model_of_safetensors(tmp_path: Path) -> None:
    """Guards both ways in which safetensors itself writes a tied model: one name of the tie, and both."""
    model = policies.Tied()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    save_model(model, str(tmp_path / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "file.safetensors")
    for name in ("model", "file"):
        assert_fits(tmp_path / f"{name}.safetensors", model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is what we mean
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_the_distributed_checkpoint_of_torch(files: int, consolidated: bool, tmp_path: Path) -> None:
    """Guards what a trainer with FSDP writes through torch's own Hugging Face writer."""
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model = policies.mlp()
    state = model.state_dict()
    where = {name: 1 + place % files for place, name in enumerate(state)}
    path = tmp_path / "step_5"
    writer = storage.HuggingFaceStorageWriter(
        path=str(path), fqn_to_index_mapping=where, save_distributed=consolidated, enable_consolidation=consolidated
    )
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    assert shards(path) == files
    assert_fits(path, model)
    assert [c.path for c in scan(tmp_path)] == [path]


def tiny(transformers: Any, kind: str) -> nn.Module:
    """A language model of some kilobytes."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 50}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **tokens)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=kind == "tied llama", **tokens,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize("size", ["1GB", "8KB"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied llama"])
def test_save_pretrained_of_transformers(kind: str, size: str, tmp_path: Path) -> None:
    """Guards the usual checkpoint of a language model, with tied embeddings and without, whole and sharded."""
    model: Any = tiny(pytest.importorskip("transformers"), kind)
    path = tmp_path / "checkpoint-5"
    model.save_pretrained(path, max_shard_size=size)
    assert (path / SINGLE).exists() if size == "1GB" else shards(path) > 1
    assert_fits(path, model)
    assert [c.path for c in scan(tmp_path)] == [path]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # accelerate's own
@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_save_model_of_accelerate(size: str, tmp_path: Path) -> None:
    """Guards what a trainer with accelerate writes, a tied model included."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny(pytest.importorskip("transformers"), "gpt2")
    path = tmp_path / "checkpoint-5"
    accelerate.Accelerator(cpu=True).save_model(model, path, max_shard_size=size)
    assert (path / SINGLE).exists() if size == "1GB" else shards(path) > 1
    assert_fits(path, model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
def test_an_adapter_of_peft(tmp_path: Path) -> None:
    """Guards that an adapter's few weights reach the policy that holds it, and only they are read."""
    peft = pytest.importorskip("peft")
    base = tiny(pytest.importorskip("transformers"), "llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    path = tmp_path / "checkpoint-5"
    model.save_pretrained(path)
    assert (path / ADAPTER).exists()
    settings = Fit(rename={r"/\.lora_(A|B)\.weight$/": r".lora_\1.default.weight"}, strict=False)
    layout = layout_of(model)
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(layout, settings)
        weights = bytearray(layout.nbytes)
        checkpoint.read_into(memoryview(weights), plan)
    came = [entry for entry in layout.tensors if entry not in plan.kept]
    assert came and all("lora_" in entry.name for entry in came)
    assert not any("lora_" in entry.name for entry in plan.kept)
    own = dict(named_tensors(model))
    for entry in came:
        bits = own[entry.name].detach().numpy().tobytes()
        assert weights[entry.offset : entry.offset + entry.nbytes] == bits


# Copies at work


class Watch:
    """A watch in a thread, with the marks of every version that it published."""

    def __init__(self, runs: Path, settle: float = 0.05) -> None:
        policy = policies.mlp(HIDDEN)
        spec = Spec("policies:mlp", "copied", SUPPORT, {"hidden": HIDDEN}, poll=0.005, select=Select(settle=settle))
        WritableSegment.create("copied", layout_of(policy), spec=spec.fingerprint()).close()
        self.syncer, self.stop = Syncer(spec, runs, role="watch"), threading.Event()
        self.versions: list[list[float]] = []
        self.told: queue.Queue[Outcome | WsyncError | BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            run(self.syncer, self.stop, self._tell)
        except BaseException as exc:  # told to the test, which fails by it
            self.told.put(exc)

    def _tell(self, outcome: Outcome | WsyncError) -> None:
        if isinstance(outcome, Outcome) and outcome.status == "published":
            assert self.syncer.standing.segment is not None
            live = self.syncer.standing.segment.live_weights()
            assert live is not None
            self.versions.append(np.unique(np.frombuffer(live, "f4")).tolist())
        self.told.put(outcome)

    def passes(self, count: int) -> list[str]:
        """What the next passes that begin from now on come to; the one at work may have begun before."""
        while not self.told.empty():
            self.told.get()
        return [self._next() for _ in range(count + 1)][1:]

    def until(self, mark: float) -> None:
        end = time.monotonic() + DEADLINE / 3
        while not self.versions or self.versions[-1] != [mark]:
            last = self._next()
            assert time.monotonic() < end, (last, self.versions)

    def _next(self) -> str:
        outcome = self.told.get(timeout=DEADLINE)
        if isinstance(outcome, BaseException) and not isinstance(outcome, WsyncError):
            raise outcome
        return outcome.status if isinstance(outcome, Outcome) else f"failed: {outcome}"

    def close(self) -> None:
        self.stop.set()
        self.thread.join(DEADLINE)
        self.syncer.close()


@pytest.fixture
def watch(runtime: Path, tmp_path: Path) -> Iterator[Callable[[], Watch]]:
    """Starts a watch of ``runs``; it is stopped after the test."""
    started: list[Watch] = []

    def start() -> Watch:
        (tmp_path / "runs").mkdir(exist_ok=True)
        started.append(Watch(tmp_path / "runs"))
        return started[-1]

    yield start
    for each in started:
        each.close()


def source(place: Path, form: str, mark: float) -> Path:
    """A checkpoint to copy, every weight of one mark."""
    policy = policies.mlp(HIDDEN)
    if form == "file":
        return write(place / f"step_{mark:.0f}.safetensors", policy, mark)
    path = place / f"checkpoint-{mark:.0f}"
    path.mkdir(parents=True)
    table = {}
    for number, (name, tensor) in enumerate(policy.state_dict().items(), 1):
        table[name] = f"model-{number:05d}-of-00004.safetensors"
        save_file({name: torch.full_like(tensor, mark)}, path / table[name])
    (path / INDEX).write_text(json.dumps({"weight_map": table}))
    return path


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(
    ("command", "form", "over"),
    [
        (["cp"], "file", False),
        (["cp"], "file", True),
        (["cp", "-r"], "shards", False),
        (["rsync", "-a"], "file", False),
        (["rsync", "-a"], "file", True),
        (["rsync", "-a", "--inplace"], "file", True),
        (["rsync", "-a"], "shards", False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_a_copy_at_work_is_never_published_half(
    command: list[str], form: str, over: bool, watch: Callable[[], Watch], tmp_path: Path
) -> None:
    """Guards the live versions where checkpoints come by copies, under new names and over an old one."""
    program = tool(command[0])
    looking = watch()
    count = 12
    for number in range(1, count + 1):
        path = source(tmp_path / "source", form, number)
        os.utime(path, (1_000_000 + number, 1_000_000 + number))  # rsync skips a file of the same size and second
        target = tmp_path / "runs" / ("latest.safetensors" if over else path.name)
        subprocess.run([program, *command[1:], str(path), str(target if form == "file" else target.parent)], check=True)
    looking.until(float(count))
    assert all(len(marks) == 1 for marks in looking.versions), looking.versions


def test_a_slow_copy_is_looked_at_and_left(watch: Callable[[], Watch], tmp_path: Path) -> None:
    """Guards the same at each stage of a copy, with passes in between: reserved, half written, all but closed."""
    write(tmp_path / "runs" / "step_1.safetensors", policies.mlp(HIDDEN), 1.0)
    whole = source(tmp_path / "source", "file", 2).read_bytes()
    looking = watch()
    looking.until(1.0)
    path = tmp_path / "runs" / "step_2.safetensors"
    with path.open("wb") as file:
        for length in (0, 100, 4096, len(whole) // 2, len(whole)):
            file.write(whole[file.tell() : length])
            file.flush()
            assert "published" not in looking.passes(2)
        os.utime(path)
    looking.until(2.0)
    assert looking.versions == [[1.0], [2.0]]


def test_a_copy_in_pieces_is_left_until_it_is_whole(watch: Callable[[], Watch], tmp_path: Path) -> None:
    """Guards against a writer that closes the file between its pieces, and one of shards that stops between them."""
    looking = watch()
    whole = source(tmp_path / "source", "file", 1).read_bytes()
    path = tmp_path / "runs" / "step_1.safetensors"
    for start in range(0, len(whole), len(whole) // 3 + 1):
        assert "published" not in looking.passes(2)
        with path.open("ab") as file:
            file.write(whole[start : start + len(whole) // 3 + 1])
    looking.until(1.0)
    directory = source(tmp_path / "source", "shards", 2)
    (tmp_path / "runs" / directory.name).mkdir()
    for shard in [directory / INDEX, *sorted(directory.glob("*.safetensors"))]:
        assert "published" not in looking.passes(2)
        shutil.copyfile(shard, tmp_path / "runs" / directory.name / shard.name)
    looking.until(2.0)
    assert looking.versions == [[1.0], [2.0]]


def test_a_place_that_is_itself_sharded_is_left_until_its_index_comes(
    watch: Callable[[], Watch], tmp_path: Path
) -> None:
    """Guards a directory that is named itself, into which shards come first and the index last."""
    path = source(tmp_path / "source", "shards", 1)
    looking = watch()
    for file in sorted(path.glob("*.safetensors")):
        shutil.copyfile(file, tmp_path / "runs" / file.name)
        assert "published" not in looking.passes(2)
    shutil.copyfile(path / INDEX, tmp_path / "runs" / INDEX)
    looking.until(1.0)
    assert looking.versions == [[1.0]]


def test_a_first_shard_is_no_partial_update(tmp_path: Path, runtime: Path) -> None:
    """Guards that with strict = false one shard of a checkpoint does not go live beside the old others."""
    policy = policies.mlp(HIDDEN)
    select = Select(settle=0)
    spec = Spec("policies:mlp", "parts", SUPPORT, {"hidden": HIDDEN}, select=select, weights=Fit(strict=False))
    with closing(WritableSegment.create("parts", layout_of(policy), spec=spec.fingerprint())):
        runs = source(tmp_path, "shards", 1).rename(tmp_path / "runs")
        with Syncer(spec, runs) as syncer:
            assert syncer.once().status == "published"
            (runs / INDEX).unlink()
            newer = source(tmp_path, "shards", 2)
            (newer / "model-00001-of-00004.safetensors").replace(runs / "model-00001-of-00004.safetensors")
            assert syncer.once().status != "published"
