"""The base of the weight updaters, and the one that updates a policy in this process; both have torchrl's API.

The members and their meaning are those of ``torchrl.collectors.WeightUpdaterBase`` and ``VanillaWeightUpdater`` (the
API of 0.9 to 0.14), implemented here without torchrl. A collector of torchrl accepts these updaters as its
``weight_updater``: it checks ``isinstance(updater, WeightUpdaterBase)`` with an abstract base class, and our class
registers there at that moment, no matter which package was imported first.

Importing this module imports neither torch nor tensordict, because the command line also pushes through an updater.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from ..checkpoints.checkpoint import Checkpoint
from ..errors import HalfWritten
from ..layout.layout import named_modules
from ..layout.module import check_extra_state, check_unmerged

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDictBase

    from ..layout.weights import Weights

Hook = Callable[[], Any]


class WeightUpdaterBase:
    """Pushes weights to workers, then runs hooks; the base of every updater.

    A subclass implements ``_sync_weights_with_worker`` and may override ``_get_server_weights`` (gets the weights if a
    push has none), ``_maybe_map_weights`` (converts them for the workers), ``_get_local_weights`` and
    ``all_worker_ids``. As with torchrl's class, its ``__init__`` need not call ``super().__init__()``. Pushes from
    several threads run one after another.
    """

    extra_state = "refuse"
    _post_hooks: list[Hook]
    _collector: weakref.ref[Any] | None
    _pushing: threading.RLock
    _told: weakref.WeakSet[torch.nn.Module]  # modules whose extra state was checked

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self._post_hooks, self._collector = [], None
        self._pushing, self._told = threading.RLock(), weakref.WeakSet()
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        _register_with_torchrl()
        return type(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_collector": None, "_pushing": None, "_told": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pushing=threading.RLock(), _told=weakref.WeakSet())

    @classmethod
    def from_policy(cls, policy: torch.nn.Module) -> Self | None:
        """An updater for this policy, or None if the class cannot make one from a policy alone."""
        return None

    @property
    def post_hooks(self) -> list[Hook]:
        """The post hooks, in the order in which they run."""
        return self._post_hooks

    def register_post_hook(self, hook: Hook) -> None:
        """Adds a hook, called without arguments after each push; not if getting or syncing the weights raised."""
        self._post_hooks.append(hook)

    @property
    def collector(self) -> Any | None:
        """The registered collector; None if none was registered, or it is gone."""
        return None if self._collector is None else self._collector()

    def register_collector(self, collector: Any) -> None:
        """Registers the collector whose policy this updater serves; keeps only a weak reference to it.

        Raises:
            RuntimeError: another collector is registered and alive.
        """
        known = self.collector
        if known is not None and known is not collector:
            raise RuntimeError(
                f"this {type(self).__name__} serves another collector already. Give each collector an updater of its "
                "own."
            )
        self._collector = weakref.ref(collector)

    def increment_version(self) -> None:
        """Increments the registered collector's policy version; usable as a post hook.

        Raises:
            RuntimeError: no collector is registered, or it is gone.
        """
        collector = self.collector
        if collector is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no collector whose version it could increment. Give it to a collector "
                "as its weight_updater first."
            )
        collector.increment_version()

    def all_worker_ids(self) -> Iterable[int | torch.device] | None:
        """The ids of the workers that a push without ``worker_ids`` serves; None if the only worker has no id."""
        return None

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Called by collectors once their workers run; does nothing."""

    def push_weights(
        self,
        policy_or_weights: Weights | Checkpoint | None = None,
        worker_ids: int | torch.device | Iterable[int | torch.device] | None = None,
    ) -> None:
        """Gets the weights, maps them, syncs every worker, then runs the post hooks.

        Args:
            policy_or_weights: an ``nn.Module``, a TensorDict, or a dict (nested, with tuple keys, or with the dotted
                names of a state_dict), with tensors on any device; if None, calls ``_get_server_weights`` once. A
                ``SharedMemoryWeightUpdater`` also accepts an open ``Checkpoint``.
            worker_ids: one id or several; None serves ``all_worker_ids()``, ``[]`` serves no worker.

        Raises:
            KeyError: a tensor's name is unknown; or, with ``strict``, a tensor is missing.
            ValueError: a tensor has another shape; or, with ``finite``, holds NaN or infinity.
            TypeError: the weights or an id are of a wrong type, or a dtype cannot hold the weights' values.
            SpecError: a module's ``state_dict()`` has entries that no update changes; see ``extra_state``.
        """
        workers = self._workers(worker_ids)
        with self._pushing:
            weights = self._get_server_weights() if policy_or_weights is None else policy_or_weights
            try:
                mapped = self._maybe_map_weights(weights)
                if workers is None:
                    self._sync_weights_with_worker(server_weights=mapped)
                for worker in workers or ():
                    self._sync_weights_with_worker(worker_id=worker, server_weights=mapped)
            finally:
                if policy_or_weights is None and isinstance(weights, Checkpoint):
                    weights.close()
            self._call_post_hooks()

    def __call__(
        self,
        policy_or_weights: Weights | Checkpoint | None = None,
        worker_ids: int | torch.device | Iterable[int | torch.device] | None = None,
    ) -> None:
        """What collectors call: ``push_weights``."""
        self.push_weights(policy_or_weights=policy_or_weights, worker_ids=worker_ids)

    def _call_post_hooks(self) -> None:
        for hook in list(self._post_hooks):
            hook()

    def _get_server_weights(self) -> Any:
        """The weights to push if the caller gives none; None if there are none."""
        return None

    def _get_local_weights(self) -> Any:
        """The weights that a push writes to, if they are in this process; else None."""
        return None

    def _maybe_map_weights(self, server_weights: Any) -> Any:
        """Converts the weights for the workers; by default turns a module into a TensorDict.

        Raises:
            SpecError: a module's ``state_dict()`` has entries that no update changes, and ``extra_state`` refuses.
        """
        if server_weights is None or isinstance(server_weights, Checkpoint):
            return server_weights
        self._check_extra_state(server_weights)
        from ..layout.weights import extract

        return extract(server_weights)

    def _check_extra_state(self, weights: Any) -> bool:
        """Returns whether these weights are a module; if so, checks its extra state once, and its adapters."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(weights, torch.nn.Module):
            return False
        check_unmerged(each for _, each in named_modules(weights))
        if weights not in self._told:
            check_extra_state(weights, self.extra_state)
            self._told.add(weights)
        return True

    def _sync_weights_with_worker(self, *, worker_id: int | torch.device | None = None, server_weights: Any) -> None:
        """Brings the weights to one worker.

        Args:
            worker_id: which worker; None if there is only one.
            server_weights: what ``_maybe_map_weights`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how weights reach a worker.")

    def _workers(self, worker_ids: object) -> list[int | torch.device] | None:
        if worker_ids is None:
            worker_ids = self.all_worker_ids()
            if worker_ids is None:
                return None
        torch = sys.modules.get("torch")
        kinds: tuple[type, ...] = (int, torch.device) if torch else (int,)
        if isinstance(worker_ids, kinds):
            return [worker_ids]  # type: ignore[list-item]
        if isinstance(worker_ids, Iterable) and not isinstance(worker_ids, str | bytes):
            listed = list(worker_ids)
            if all(isinstance(worker, kinds) for worker in listed):
                return listed
        raise TypeError(f"worker_ids is an int, a torch.device, or a list of them. Got {worker_ids!r}.")


class VanillaWeightUpdater(WeightUpdaterBase):
    """Updates a policy's weights in this process, in place.

    Args:
        weight_getter: called by ``push_weights()`` for the weights; returns None if nothing is new.
        policy_weights: a TensorDict of the policy's own tensors, on any devices, which are written in place.
        strict: whether every push must have every tensor; if False, missing tensors keep their values.
        finite: whether to refuse NaN and infinity, except an infinity that the policy has in the same place.
        extra_state: what to do with a module whose ``state_dict()`` has entries that no update changes
            (``get_extra_state``, packed quantised weights): ``"ignore"`` logs them, ``"refuse"`` raises SpecError.

    A push writes all its tensors or none. Other float dtypes are cast to the target's. If a tensor's class fails in a
    copy, and the tensors already written cannot be restored, that push and all later ones raise HalfWritten.
    """

    strict = finite = False  # for a subclass whose __init__ sets neither
    _half_written: HalfWritten | None = None

    def __init__(
        self,
        *,
        weight_getter: Callable[[], Any] | None = None,
        policy_weights: TensorDictBase,
        strict: bool = False,
        finite: bool = False,
        extra_state: str = "refuse",
    ) -> None:
        from tensordict import TensorDictBase

        if not isinstance(policy_weights, TensorDictBase):
            raise TypeError(
                f"policy_weights is a TensorDict of the policy's tensors, not a {type(policy_weights).__name__}. Use "
                "TensorDict.from_module(policy), or VanillaWeightUpdater.from_policy(policy)."
            )
        self.weight_getter, self.policy_weights = weight_getter, policy_weights
        self.strict, self.finite, self.extra_state = strict, finite, extra_state

    @classmethod
    def from_policy(cls, policy: torch.nn.Module, extra_state: str = "refuse") -> Self:
        """Makes an updater for a policy's own parameters and all its buffers.

        Args:
            policy: an ``nn.Module`` or ``TensorDictModule``.
            extra_state: as for the class.

        Raises:
            SpecError: the policy's ``state_dict()`` has entries that no update changes.
        """
        from tensordict import TensorDict

        updater = cls(policy_weights=TensorDict.from_module(policy))
        updater.extra_state = extra_state
        updater._check_extra_state(policy)
        return updater

    def _get_server_weights(self) -> Any:
        return None if self.weight_getter is None else self.weight_getter()

    def _get_local_weights(self) -> TensorDictBase:
        return self.policy_weights

    def _sync_weights_with_worker(self, *, worker_id: int | torch.device | None = None, server_weights: Any) -> None:
        if self._half_written:
            raise self._half_written
        if server_weights is None:
            return
        from ..layout.weights import aligned, check, copy, flatten
        from ..policy.tensors import drop_caches

        sources = flatten(server_weights)
        if not sources and not self.strict:
            return
        targets = flatten(self._get_local_weights())
        sources = aligned(targets, sources)
        check(targets, sources, strict=self.strict, finite=self.finite)
        try:
            copy(targets, sources)
        except HalfWritten as exc:
            self._half_written = exc
            raise
        finally:
            drop_caches()


def _register_with_torchrl() -> None:
    """Makes ``isinstance(updater, torchrl…WeightUpdaterBase)`` true once torchrl is imported, without inheriting.

    Called when an updater's ``__class__`` is read, which is the first thing that such a check does.
    """
    module = sys.modules.get("torchrl.collectors.weight_update")
    base = getattr(module, "WeightUpdaterBase", None)
    if base is not None and base not in _known:
        base.register(WeightUpdaterBase)
        _known.add(base)


_known: weakref.WeakSet[Any] = weakref.WeakSet()
