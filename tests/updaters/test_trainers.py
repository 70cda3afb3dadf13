"""Trainers publish in a line: a plain loop, and the callbacks in the real trainers of three frameworks."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import mlp
from processes import DEADLINE
from torch import nn

import wsync
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.updaters.publisher import Periodic


def live_step(seen: list[Any]) -> None:
    """Notes the step that is live, where it is another than before."""
    live = Segment.open("policy").live()
    if live and live.step != (seen or [None])[-1]:
        seen.append(live.step)


def assert_live(policy: nn.Module, build: Any) -> None:
    """What is live are the policy's weights, to the bit."""
    other = build()
    with wsync.attach(other, "policy", mode="copy"):
        pairs = zip(policy.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_a_plain_loop_publishes_in_a_line(runtime: Path) -> None:
    """Each push is a version with the trainer's step; weights that are not finite are refused, and go no further."""
    policy = mlp()
    with wsync.publisher("policy", policy) as publisher:
        assert [publisher.push(step) for step in (10, 5)] == [1, 2]
        torch.nn.init.constant_(policy[0].weight, 3.0)  # type: ignore[arg-type]
        assert publisher.push() == 3
        assert_live(policy, mlp)
        torch.nn.init.constant_(policy[0].weight, float("nan"))  # type: ignore[arg-type]
        with pytest.raises((ValueError, wsync.WsyncError)):
            publisher.push(11)
    live = Segment.open("policy").live()
    assert live and (live.version, live.step) == (3, None)


class Scratch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


@pytest.mark.parametrize(
    "policy", [None, mlp().state_dict(), nn.ReLU(), Scratch()], ids=lambda given: type(given).__name__
)
def test_what_is_no_policy_is_refused(runtime: Path, policy: Any) -> None:
    """Guards a message that says what a publisher takes, where the push failed with Python's own error."""
    with pytest.raises(wsync.UsageError, match="takes an nn.Module|neither parameters nor"):
        wsync.publisher("policy", policy).push(1)
    with pytest.raises(wsync.UsageError, match="5 cannot be a segment's name"):
        wsync.publisher(5, mlp()).push(1)  # type: ignore[arg-type]
    assert list(runtime.iterdir()) == []


def test_pushes_from_several_threads_keep_their_own_step_and_files(runtime: Path) -> None:
    """Each version has the step and the files of the push that returned it, and a later push has none of them."""
    publisher, returned, seen = wsync.publisher("policy", mlp()), dict[int, Any](), dict[int, Any]()
    threads = [threading.Thread(target=lambda step=step: push(step)) for step in (7, 8, 9)]

    def push(step: int) -> None:
        files = {"step": b"%d" % step}
        returned[publisher.push(step, extras=files)] = step, files

    def gate(staged: object) -> None:
        for other in threads:
            if other.ident is None:  # the first push is at work, and the others come meanwhile
                other.start()
                other.join(0.1)

    def look() -> None:
        with wsync.attach(mlp(), "policy") as reader:
            seen[reader.version] = reader.step, dict(reader.extras)

    publisher._updater.gate = gate
    publisher._updater.register_post_hook(look)
    threads[0].start()
    for thread in threads:
        thread.join(DEADLINE)
    assert seen == returned and len(seen) == 3
    publisher.push(10)
    assert seen[4] == (10, {})
    publisher.close()


def test_a_busy_segment_does_not_end_a_training(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The step is warned of, and the next one that is due brings its weights; the end is always published."""
    periodic, seen = Periodic("policy", 10, None, None), list[Any]()
    periodic.start(mlp(), 0)
    live_step(seen)
    with WritableSegment.open("policy").publishing(), caplog.at_level(logging.WARNING, "wsync"):
        periodic.at(10)
    assert "step 10 was not published" in caplog.text
    for step in (11, 19, 20, 25):
        periodic.at(step)
        live_step(seen)
    periodic.end(25)
    live_step(seen)
    periodic.end(25)
    live_step(seen)
    assert seen == [0, 20, 25] and Segment.open("policy").version == 3
    with pytest.raises(wsync.UsageError, match="every=0"):
        Periodic("policy", 0, None, None)


def test_stable_baselines3_publishes_while_it_learns(runtime: Path) -> None:
    """Real PPO on CartPole: a version at the start, every so many steps, and at the end, with the final weights."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.callbacks import BaseCallback

    from wsync.stable_baselines3 import WsyncCallback

    def build(**options: Any) -> Any:
        return stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu", **options)

    class Look(BaseCallback):  # type: ignore[misc]
        def _on_step(self) -> bool:
            live_step(seen)
            return True

    model, seen = build(), list[Any]()
    model.learn(192, callback=[WsyncCallback("policy", every=100), Look()])
    live_step(seen)
    assert seen == [0, 100, 192]
    assert_live(model.policy, lambda: build().policy)
    part = WsyncCallback("part", every=100, policy=lambda policy: policy.action_net)
    model.learn(64, callback=part, reset_num_timesteps=False)
    assert wsync.attach(nn.Linear(64, 2), "part", timeout=0, mode="copy").step == 256


@pytest.mark.parametrize("kind", ["box", "dict", "off"])
def test_the_statistics_of_vec_normalize_travel_with_the_weights(runtime: Path, kind: str) -> None:
    """Real PPO in a VecNormalize: a version has the statistics of its moment, and a player scales to the same bits."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    import gymnasium
    import numpy as np
    from safetensors.numpy import load
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from wsync.stable_baselines3 import WsyncCallback, normalize

    class AsDict(gymnasium.ObservationWrapper):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self) -> None:
            super().__init__(gymnasium.make("CartPole-v1"))
            box = self.env.observation_space
            self.observation_space = gymnasium.spaces.Dict({"mean": box, "raw": box})

        def observation(self, observation: Any) -> Any:
            return {"mean": observation, "raw": observation}

    all_options: dict[str, dict[str, Any]] = {"dict": {"norm_obs_keys": ["mean"]}, "off": {"norm_obs": False}}
    options = all_options.get(kind, {})
    make = AsDict if kind == "dict" else lambda: gymnasium.make("CartPole-v1")
    env = VecNormalize(DummyVecEnv([make, make]), clip_obs=1.0, epsilon=1e-3, **options)

    class Look(BaseCallback):  # type: ignore[misc]
        def _on_step(self) -> bool:
            with wsync.lease("policy") as held:
                if held.version not in seen:
                    seen.append(held.version)
                    observation, extras = env.get_original_obs(), held.extras
                    one, other = env.normalize_obs(observation), normalize(extras, observation)
                    pairs = [(one[key], other[key]) for key in one] if kind == "dict" else [(one, other)]
                    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
                    assert extras["note"] == b"2" and load(extras["vec_normalize.safetensors"])["ret_rms.count"] > 1
            return True

    seen = [1]  # from before the first step
    name = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = stable_baselines3.PPO(name, env, n_steps=64, batch_size=64, n_epochs=1, device="cpu")
    model.learn(256, callback=[WsyncCallback("policy", every=100, extras=lambda: {"note": b"2"}), Look()])
    assert seen == [1, 2, 3]
    if kind != "off":
        with wsync.lease("policy") as held, pytest.raises(wsync.UsageError, match="the observation is"):
            normalize(held.extras, np.ones(4) if kind == "dict" else {"mean": np.ones(4)})
    with pytest.raises(wsync.UsageError, match="no vec_normalize"):
        normalize({}, np.ones(4))


def test_transformers_publishes_while_it_trains(runtime: Path, tmp_path: Path) -> None:
    """A real Trainer: a version at the start, every so many optimizer steps, and at the end, with the final weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from wsync.transformers import WsyncCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined, unused-ignore]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            live_step(seen)

    model, seen = Model(), list[Any]()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    data: Any = [{"x": torch.ones(4)}] * 10
    callbacks = [WsyncCallback("policy", every=2), Look()]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    live_step(seen)
    assert seen == [0, 2, 4, 5]
    assert_live(model, Model)


@pytest.mark.filterwarnings("ignore")  # what Lightning says of its own surroundings
def test_lightning_publishes_while_it_trains(runtime: Path, tmp_path: Path) -> None:
    """A real Trainer: a version at the start, every so many optimizer steps, and at the end, with the final weights."""
    try:
        from lightning import pytorch as lightning
    except ModuleNotFoundError:
        lightning = pytest.importorskip("pytorch_lightning")
    from wsync.lightning import WsyncCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Look(lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
        def on_train_batch_end(self, *_: Any) -> None:
            live_step(seen)

    module, seen = Module(), list[Any]()
    trainer = lightning.Trainer(
        max_steps=5, callbacks=[WsyncCallback("policy", every=2, policy=lambda module: module.net), Look()],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(10, 4), batch_size=2))  # type: ignore[arg-type]
    live_step(seen)
    assert seen == [0, 2, 4, 5]
    assert_live(module.net, lambda: nn.Linear(4, 2))
