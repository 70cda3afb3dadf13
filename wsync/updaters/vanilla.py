"""The weight updaters: the API that policies and torchrl's collectors already speak.

The members and their meaning are those of ``torchrl.collectors.WeightUpdaterBase`` and ``VanillaWeightUpdater`` (the
API of 0.9 to 0.14), implemented here so that nothing of torchrl is needed. A collector of torchrl takes these updaters
as its ``weight_updater``: its check is ``isinstance(updater, WeightUpdaterBase)`` with an abstract base class, and our
class registers there at that moment, no matter which package was imported first.

Importing this module imports neither torch nor tensordict: the command line pushes through an updater too.
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

    A subclass implements ``_sync_weights_with_worker`` and may override ``_get_server_weights`` (where weights come
    from when none are given), ``_maybe_map_weights`` (what is done to them on the way), ``_get_local_weights`` and
    ``all_worker_ids``; as with torchrl's, its ``__init__`` need not call ours. Pushes from several threads run one
    after another.
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
        """The hooks, in the order in which they run."""
        return self._post_hooks

    def register_post_hook(self, hook: Hook) -> None:
        """Adds a hook, called without arguments once the weights are in, but not after a getter or sync that raised."""
        self._post_hooks.append(hook)

    @property
    def collector(self) -> Any | None:
        """The registered collector; None if none was registered, or it is gone."""
        return None if self._collector is None else self._collector()

    def register_collector(self, collector: Any) -> None:
        """Registers the collector whose policy this updater serves; it is held weakly.

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
        """Moves the registered collector's policy version by one; usable as a post hook.

        Raises:
            RuntimeError: no collector is registered, or it is gone.
        """
        collector = self.collector
        if collector is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no collector whose version it could raise. Give it to a collector as "
                "its weight_updater first."
            )
        collector.increment_version()

    def all_worker_ids(self) -> Iterable[int | torch.device] | None:
        """The workers that a push without ``worker_ids`` serves; None if there is just one, without an id."""
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
                names of a state_dict), tensors on any device; None asks ``_get_server_weights``, once. Updaters of
                segments take an opened ``Checkpoint`` as well.
            worker_ids: one id or several; None serves ``all_worker_ids()``, ``[]`` serves none.

        Raises:
            KeyError: a tensor's name is unknown, or is missing and all must come.
            ValueError: a tensor has another shape, or is not finite and must be.
            TypeError: the weights, an id or a dtype have a wrong type.
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
        """The weights that a push writes to, if they are in this process."""
        return None

    def _maybe_map_weights(self, server_weights: Any) -> Any:
        """Maps the weights between the getter and the workers; by default turns a module into a TensorDict.

        Raises:
            SpecError: a module's ``state_dict()`` holds what no update changes, and ``extra_state`` is ``"refuse"``.
        """
        if server_weights is None or isinstance(server_weights, Checkpoint):
            return server_weights
        self._check_extra_state(server_weights)
        from ..layout.weights import extract

        return extract(server_weights)

    def _check_extra_state(self, weights: Any) -> bool:
        """Whether these weights are a module; if so, checks its extra state once."""
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
            worker_id: which; None if there is just one.
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
        weight_getter: gives the weights of a push without any; may return None for "nothing new".
        policy_weights: a TensorDict of the policy's live tensors, on any devices, written in place: addresses stay.
        strict: every push must bring every tensor; otherwise missing ones stay as they were.
        finite: refuse NaN and infinity.
        extra_state: ``"ignore"`` takes a module whose ``state_dict()`` holds more than tensors (``get_extra_state``,
            packed quantised weights), which no update changes, and says so once.

    Either all tensors of a push are written or none. Another float dtype is cast to the target's. If a tensor's class
    fails half-way and the tensors before it cannot be restored, that push and all later ones raise HalfWritten.
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
        """An updater on the policy's live parameters and all its buffers.

        Args:
            policy: an ``nn.Module`` or ``TensorDictModule``.
            extra_state: as for the class.

        Raises:
            SpecError: the policy's ``state_dict()`` holds what no update changes.
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

    Called when somebody asks for an updater's class, with which an abstract base class begins its check.
    """
    module = sys.modules.get("torchrl.collectors.weight_update")
    base = getattr(module, "WeightUpdaterBase", None)
    if base is not None and base not in _known:
        base.register(WeightUpdaterBase)
        _known.add(base)


_known: weakref.WeakSet[Any] = weakref.WeakSet()
