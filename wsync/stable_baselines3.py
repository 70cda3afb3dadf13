"""``wsync.stable_baselines3.WsyncCallback``; importing this module imports stable_baselines3."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load, save
from stable_baselines3.common.callbacks import BaseCallback

from .errors import UsageError
from .updaters.publisher import Periodic

STATISTICS = "vec_normalize.safetensors"


class WsyncCallback(BaseCallback):  # type: ignore[misc]
    """``model.learn(100_000, callback=WsyncCallback("cartpole", every=10_000))`` publishes ``model.policy``.

    ``every`` counts environment steps (``num_timesteps``); ``policy=lambda policy: policy.actor`` publishes a part. See
    ``updaters.publisher.Periodic`` for the arguments. The statistics of the model's ``VecNormalize``, if it has one,
    travel with the weights; ``normalize`` applies them.
    """

    def __init__(
        self, name: str, every: int, *, policy: Any = None, runtime_dir: Any = None, extras: Any = None
    ) -> None:
        super().__init__()
        self._periodic = Periodic(name, every, policy, runtime_dir, self._all_extras)
        self._extras = extras

    def _all_extras(self) -> dict[str, bytes]:
        env = self.model.get_vec_normalize_env()
        return {**(statistics(env) if env else {}), **(self._extras() if self._extras else {})}

    def _on_training_start(self) -> None:
        self._periodic.start(self.model.policy, self.num_timesteps)

    def _on_step(self) -> bool:
        self._periodic.at(self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        self._periodic.end(self.model.num_timesteps)


def statistics(env: Any) -> dict[str, bytes]:
    """The current statistics of a ``VecNormalize``, for ``extras``: the bytes of a safetensors file, by its name.

    The file holds ``NAME.mean``, ``NAME.var`` and ``NAME.count`` as float64, where NAME is ``ret_rms`` or ``obs_rms``
    (``obs_rms.KEY`` for each normalized key, if observations are dicts). Its metadata say how they are applied.
    """
    own = getattr(env, "obs_rms", {})  # made without norm_obs, it has none
    each = {f"obs_rms.{key}": rms for key, rms in own.items()} if isinstance(own, dict) else {"obs_rms": own}
    tensors = {
        f"{name}.{field}": np.array(getattr(rms, field), np.float64, order="C")
        for name, rms in (each | {"ret_rms": env.ret_rms}).items()
        for field in ("mean", "var", "count")
    }
    settings = ("clip_obs", "clip_reward", "epsilon", "gamma", "norm_obs", "norm_reward")
    return {STATISTICS: save(tensors, {name: str(getattr(env, name)) for name in settings})}


def normalize(extras: Mapping[str, bytes], observation: Any) -> Any:
    """Normalizes an observation as ``VecNormalize.normalize_obs`` does: ``normalize(reader.extras, observation)``.

    Args:
        extras: those of the version that acts.
        observation: an array or a dict of arrays, of one environment or of several.

    Returns float32 arrays of the same shapes; what the trainer did not normalize is returned as it is.

    Raises:
        UsageError: the version has no statistics, or this is an array and the trainer had dicts, or the reverse.
    """
    if STATISTICS not in extras:
        raise UsageError(
            f"this version has no {STATISTICS}. Train with a VecNormalize and WsyncCallback, or publish "
            "statistics(env) among the extras; without a VecNormalize, give the policy the observation as it is."
        )
    tensors, settings = _read(extras[STATISTICS])
    if settings["norm_obs"] != "True":
        return observation
    if isinstance(observation, Mapping) == ("obs_rms.mean" in tensors):
        given, trained = ("a dict", "arrays") if isinstance(observation, Mapping) else ("an array", "dicts")
        raise UsageError(f"the observation is {given}, and the trainer's were {trained}. Use the same environment.")
    clip, epsilon = float(settings["clip_obs"]), float(settings["epsilon"])

    def scaled(value: Any, name: str) -> Any:
        if f"{name}.mean" not in tensors:
            return value
        scale = np.sqrt(tensors[f"{name}.var"] + epsilon)
        return np.clip((value - tensors[f"{name}.mean"]) / scale, -clip, clip).astype(np.float32)

    if isinstance(observation, Mapping):
        return {key: scaled(value, f"obs_rms.{key}") for key, value in observation.items()}
    return scaled(observation, "obs_rms")


@functools.lru_cache(maxsize=4)
def _read(data: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    return load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
