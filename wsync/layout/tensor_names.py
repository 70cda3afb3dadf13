"""Names that differ only by what wraps modules: ``_orig_mod.`` of torch.compile, ``module.`` of data parallels."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def bare(name: str) -> str:
    """A name without what wraps modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def seen_through(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Maps names to known names that differ from them only by wrappers.

    Left out are names that are known already, names that match several known ones, and names whose known form is given
    too.
    """
    names = list(names)
    given = set(names)
    strange = [name for name in names if name not in known]
    if not strange:
        return {}
    left = [name for name in known if name not in given]
    homes, times = {bare(name): name for name in left}, Counter(map(bare, strange)) + Counter(map(bare, left))
    return {name: homes[bare(name)] for name in strange if bare(name) in homes and times[bare(name)] == 2}


def matching(names: Iterable[str], globs: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}
