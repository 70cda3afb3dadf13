"""Options of a reader: a call for each new version, and a limit to the age of the policy's weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import Stale, UsageError
from ..text import duration

_log = logging.getLogger("wsync")
OnVersion = Callable[[int, int | None, Mapping[str, bytes]], object]


@dataclass(frozen=True, slots=True)
class Terms:
    """Three options of ``attach``, which explains them.

    Raises:
        UsageError: one of them is invalid.
    """

    on_version: OnVersion | None = None
    on_version_error: Literal["log", "raise"] = "log"
    max_age: float | None = None

    def __post_init__(self) -> None:
        given: Any = self.on_version
        if given is not None and not callable(given):
            raise UsageError(f"on_version={given!r} cannot be called. Give a function of version, step and extras.")
        if self.on_version_error not in ("log", "raise"):
            raise UsageError(f'on_version_error={self.on_version_error!r} is unknown. Use "log" or "raise".')
        given = self.max_age
        if given is not None and not (isinstance(given, int | float) and not math.isnan(given) and given > 0):
            raise UsageError(f"max_age={given!r} is not a number of seconds above 0. Give one, or None for any age.")

    def tell(self, name: str, version: int, step: int | None, extras: Mapping[str, bytes]) -> None:
        """Calls ``on_version`` with the version that the policy has now."""
        if self.on_version is None:
            return
        try:
            self.on_version(version, step, extras)
        except Exception:  # the user's code may raise anything
            _log.exception("on_version failed at version %d of %r, which the policy has all the same", version, name)
            if self.on_version_error == "raise":
                raise

    def check_age(self, name: str, version: int, age: float) -> None:
        """Raises Stale if the policy must not act on a version of this age, in seconds."""
        if self.max_age is not None and age > self.max_age:
            raise Stale(
                f"the policy attached to {name!r} has version {version}, which was published {duration(age)} ago, and "
                f"max_age is {self.max_age:g} s. See what its publisher does (`wsync status {name}`); the next "
                "refresh() takes a newer version if there is one."
            )
