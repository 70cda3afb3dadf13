"""The settings of ``[weights]``: which tensors of a checkpoint are taken, under which names and in which dtypes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import UsageError
from ..layout.layout import TensorEntry
from ..layout.tensor_names import bare, matching

Built = Callable[[Iterable[str]], Mapping[str, bytes]]
"""Returns, by name, the bytes that these tensors of the policy have when it is built."""
INTEGERS = {"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}
FLOATS = {"F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3"}


@dataclass(frozen=True)
class Fit:
    """What is taken from a checkpoint, and how: the settings of ``[weights]``.

    Attributes:
        prefix: only names that begin with it are taken; it is removed from them.
        rename: old names to new ones, applied after the prefix is removed. An old name is exact, or a regular
            expression between slashes, with its groups as ``\\1`` … in the new name.
        include: only names that match one of these globs are taken; empty takes all.
        exclude: names that match one of these globs are left out.
        own: globs of tensors that each process of the policy keeps for itself; no segment or checkpoint needs them.
        cast: whether floats may become the policy's float dtype, and integers its integer dtype if their values fit.
        strict: whether a checkpoint must have every tensor of the policy and no other; if not, missing ones keep their
            live values, and unknown ones are ignored.
        finite: whether NaN and infinity are refused, except an infinity that the policy has when it is built.
        finite_except: globs of tensors that may hold infinities, never NaN.
        missing: ``"policy"`` gives missing tensors the values that the policy has when it is built.
        extra_state: if ``state_dict()`` holds what a segment cannot, ``"ignore"`` that or ``"refuse"`` the policy.
        base: path or URL of the checkpoint that a PEFT adapter is merged into; needed if the policy has no adapter.
    """

    prefix: str = ""
    rename: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    cast: bool = False
    strict: bool = True
    finite: bool = True
    finite_except: tuple[str, ...] = ()
    missing: str = ""
    base: str = ""
    extra_state: str = "refuse"
    partial: bool = True  # whether there are live values to keep; only the publisher knows
    mixture: int = field(default=0, repr=False)  # for the history: the version that kept live values, which no file has
    built: Built | None = field(default=None, repr=False, compare=False)  # asks the policy itself

    def __post_init__(self) -> None:
        if self.missing not in ("", "policy"):
            raise UsageError(f'weights.missing = {self.missing!r} is unknown. Use "policy", or leave it out.')
        if self.extra_state not in ("refuse", "ignore"):
            raise UsageError(f'weights.extra_state = {self.extra_state!r} is unknown. Use "refuse" or "ignore".')
        for old, new in self.rename.items():
            try:
                expression = self._expression(old)
                if expression:
                    expression.sub(new, "")  # also fails for a missing group
            except (re.error, IndexError) as exc:
                raise UsageError(
                    f"weights.rename: {old!r} to {new!r} is not a regular expression ({exc}). Correct it."
                ) from exc

    def name(self, stored: str) -> str | None:
        """The name in the policy of a checkpoint's tensor; None if it is not taken."""
        if not stored.startswith(self.prefix):
            return None
        name = stored[len(self.prefix) :]
        for old, new in self._renames:
            name = (new if name == old else name) if isinstance(old, str) else old.sub(new, name)
        if self.include and not any(fnmatch.fnmatchcase(name, glob) for glob in self.include):
            return None
        return None if matching([name], self.exclude) or matching([name, bare(name)], self.own) else name

    def takes(self, stored: str, wanted: str) -> bool:
        """Whether a tensor of dtype ``stored`` may become one of dtype ``wanted``."""
        castable = {stored, wanted} <= FLOATS or {stored, wanted} <= INTEGERS
        return stored == wanted or (self.cast and castable)

    def may_be_infinite(self, entry: TensorEntry) -> bool:
        """Whether a tensor of the policy may hold infinities."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.finite_except for name in entry.names)

    @cached_property
    def _renames(self) -> list[tuple[str | re.Pattern[str], str]]:
        return [(self._expression(old) or old, new) for old, new in self.rename.items()]

    @staticmethod
    def _expression(old: str) -> re.Pattern[str] | None:
        return re.compile(old[1:-1]) if len(old) > 2 and old[0] == old[-1] == "/" else None
