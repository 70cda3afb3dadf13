"""A torchrl collector whose policy follows a checkpoint directory: `python examples/torchrl_collector.py`.

A trainer in the background learns to repeat the two numbers that it sees. It knows nothing of collectors; all it does
is leave a safetensors checkpoint behind now and then. The collector plays on in the meantime and takes the newest one
between two batches: watch its reward climb from about -2 to 0. What you would copy is `collect`; the rest is there so
that it has something to follow.
"""

import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

try:
    import torch
    from safetensors.torch import save_file
    from tensordict import TensorDict, TensorDictBase
    from tensordict.nn import TensorDictModule
    from torch import nn
    from torchrl.collectors import Collector
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import EnvBase

    import wsync
except ModuleNotFoundError as missing:
    print(f"{missing.name} not found; install with: pip install 'wsync[torchrl]'", file=sys.stderr)
    sys.exit(2)

# torchrl would rather have its own schemes, which know nothing of files; updaters work in it as ever.
warnings.filterwarnings("ignore", "Using WeightUpdaterBase is deprecated", DeprecationWarning)


def make_actor() -> nn.Module:
    """Two numbers in, two out. The trainer's step is a buffer, so that every checkpoint brings its own."""
    actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    actor.register_buffer("step", torch.tensor(0))
    return actor


class Repeat(EnvBase):  # type: ignore[misc]
    """Shows two random numbers; the reward is minus the squared distance of the action to them."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded(2))
        self.action_spec, self.reward_spec = Unbounded(2), Unbounded(1)

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        return TensorDict({"observation": torch.randn(2)})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = -(tensordict["action"] - tensordict["observation"]).square().sum(-1, keepdim=True)
        return TensorDict({"observation": torch.randn(2), "reward": reward, "done": torch.tensor([False])})

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def collect(checkpoints: Path, trainer: threading.Thread) -> None:
    """Collect batches with the newest weights, until the trainer has ended and its last checkpoint has acted."""
    actor = make_actor()
    updater = wsync.VanillaWeightUpdater(
        weight_getter=wsync.CheckpointWeightGetter(checkpoints, only_new=True),
        policy_weights=TensorDict.from_module(actor),  # what the trainer saves, not the TensorDictModule around it
    )
    policy = TensorDictModule(actor, in_keys=["observation"], out_keys=["action"])
    collector = Collector(Repeat, policy, frames_per_batch=250, total_frames=-1, weight_updater=updater,
                          track_policy_version=True, auto_register_policy_transforms=False)  # fmt: skip
    try:
        last = False
        for batch in collector:
            version = int(batch["next", "policy_version"][-1])  # torchrl's count of updates, also those without news
            step, reward = int(actor.get_buffer("step")), float(batch["next", "reward"].mean())
            print(f"version {version:2}   step {step:3}   mean reward {reward:6.3f}", flush=True)
            if last:
                break
            last = not trainer.is_alive()
            try:
                collector.update_policy_weights_()  # the newest checkpoint; nothing where there is no newer one
            except wsync.CheckpointError as exc:  # there is none yet, or it is broken: play on with what is there
                print(exc, file=sys.stderr)
    finally:
        collector.shutdown()


def train(checkpoints: Path) -> None:
    """Learn for a few seconds and save now and then, as a trainer elsewhere would."""
    actor = make_actor()
    step = actor.get_buffer("step")
    optimizer = torch.optim.Adam(actor.parameters(), 1e-3)
    while step <= 300:
        if step % 30 == 0:
            save_file(actor.state_dict(), checkpoints / "new.tmp")
            (checkpoints / "new.tmp").rename(checkpoints / f"step_{int(step)}.safetensors")  # whole, or not at all
            time.sleep(0.4)
        observations = torch.randn(64, 2)
        optimizer.zero_grad()
        torch.autograd.backward((actor(observations) - observations).square().sum(-1).mean())
        optimizer.step()
        step += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="wsync-torchrl-", ignore_cleanup_errors=True) as folder:
        background = threading.Thread(target=train, args=(Path(folder),), daemon=True)
        background.start()
        collect(Path(folder), background)
