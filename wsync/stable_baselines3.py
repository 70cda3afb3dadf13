"""``wsync.stable_baselines3.WsyncCallback``; importing it imports stable_baselines3."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from .updaters.publisher import Periodic


class WsyncCallback(BaseCallback):  # type: ignore[misc]
    """``model.learn(100_000, callback=WsyncCallback("cartpole", every=10_000))`` publishes ``model.policy``.

    ``every`` counts the steps of the environments (``num_timesteps``); ``policy=lambda policy: policy.actor`` publishes
    a part. See ``Periodic`` for the arguments.
    """

    def __init__(self, name: str, every: int, *, policy: Any = None, runtime_dir: Any = None) -> None:
        super().__init__()
        self._periodic = Periodic(name, every, policy, runtime_dir)

    def _on_training_start(self) -> None:
        self._periodic.start(self.model.policy, self.num_timesteps)

    def _on_step(self) -> bool:
        self._periodic.at(self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        self._periodic.end(self.model.num_timesteps)
