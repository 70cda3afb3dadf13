"""``wsync.transformers.WsyncCallback``; importing this module imports transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .updaters.publisher import Periodic


class WsyncCallback(TrainerCallback):
    """``Trainer(…, callbacks=[WsyncCallback("policy", every=100)])`` publishes the model from the first process.

    ``every`` counts optimizer steps (``state.global_step``). See ``updaters.publisher.Periodic`` for the arguments.
    That process must have the whole model, which it does not under FSDP and DeepSpeed ZeRO-3.
    """

    def __init__(
        self, name: str, every: int, *, policy: Any = None, runtime_dir: Any = None, extras: Any = None
    ) -> None:
        self._periodic = Periodic(name, every, policy, runtime_dir, extras)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._periodic.start(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._periodic.at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._periodic.end(state.global_step)
