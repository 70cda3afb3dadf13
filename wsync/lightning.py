"""``wsync.lightning.WsyncCallback``; importing this module imports lightning, or else pytorch_lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

from .updaters.publisher import Periodic


class WsyncCallback(Callback):  # type: ignore[misc]
    """``Trainer(callbacks=[WsyncCallback("policy", every=100)])`` publishes the module from the first process.

    ``every`` counts optimizer steps (``trainer.global_step``); ``policy=lambda module: module.actor`` publishes a part.
    See ``updaters.publisher.Periodic``. That process must have the whole module, which it does not under FSDP.
    """

    def __init__(
        self, name: str, every: int, *, policy: Any = None, runtime_dir: Any = None, extras: Any = None
    ) -> None:
        self._periodic = Periodic(name, every, policy, runtime_dir, extras)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._periodic.start(pl_module, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            self._periodic.at(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._periodic.end(trainer.global_step)
