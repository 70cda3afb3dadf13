"""Whether the files of a checkpoint are of one save. A trainer, or rsync, that writes over an earlier save replaces one
file after another; until the last of them is replaced, the directory holds some files of either save, each of them
whole.

Three things tell that: files that are still those that were published from this place, beside others that are not;
shards that are newer than the index beside shards that are older; and shards whose metadata name different steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from ..errors import BeingRewritten
from .files import Parts, fingerprint, fingerprints, written
from .settling import PATIENCE


def check_files(
    parts: Parts,
    infos: Sequence[os.stat_result],
    index: os.stat_result,
    settle: float,
    published: Sequence[str],
) -> None:
    """Checks that the files of a checkpoint in several are of one save, as far as they can tell.

    Args:
        infos: of ``parts.files``.
        index: of ``parts.index``.
        settle: seconds that a checkpoint in several has to stand still.
        published: identities of what was published from this path before.

    Raises:
        BeingRewritten: they are of two saves, or may be and have not stood still for ``PATIENCE * settle`` seconds.
    """
    times = [written(info) for info in infos]
    mixed = min(times) < written(index) < max(times)
    for earlier in map(fingerprints, published):
        same = [fingerprint(info) in earlier for info in infos]
        _check_all_changed(parts, same)
        mixed = mixed or any(same) != (fingerprint(index) in earlier)
    if mixed:
        _let_stand(parts, infos, index, settle)


def check_changed(
    parts: Parts, infos: Sequence[os.stat_result], index: os.stat_result, settle: float, since: int
) -> None:
    """The same of files that a writer has written over in place, and put their times back: their change times tell.

    Args:
        since: newest change time of all of them as they were when they were published, ns.

    Raises:
        BeingRewritten: as of ``check_files``.
    """
    _check_all_changed(parts, [info.st_ctime_ns <= since for info in infos])
    if index.st_ctime_ns <= since:
        _let_stand(parts, infos, index, settle)


def _check_all_changed(parts: Parts, same: Sequence[bool]) -> None:
    if any(same) and not all(same):
        raise BeingRewritten(
            f"{parts.path} is being rewritten: {same.count(False)} of its {len(same)} weight files have changed "
            f"since it was published, and {parts.files[same.index(True)].name} has not. It is published once all "
            "have. Wait for its writer; if the writer has ended, touch the files that stay as they are."
        )


def _let_stand(parts: Parts, infos: Sequence[os.stat_result], index: os.stat_result, settle: float) -> None:
    now = time.time()
    changed = [t / 1e9 for info in (index, *infos) for t in (info.st_mtime_ns, info.st_ctime_ns)]
    left = max((t for t in changed if t <= now + 1), default=0.0) + PATIENCE * settle - now
    if left > 0:
        assert parts.index
        raise BeingRewritten(
            f"{parts.path} may hold files of two saves: {parts.index.name} is older than some of its weights and "
            "newer than others, or only one of the two has changed. Wait for its writer: it is published once all "
            f"files have changed, or none has changed for {PATIENCE * settle:g} s ({PATIENCE:g} times select.settle)."
        )


def check_steps(parts: Parts, metadata: Sequence[Mapping[str, str]]) -> None:
    """Checks that no two files of a checkpoint name different steps.

    Args:
        metadata: of each of ``parts.files``.

    Raises:
        BeingRewritten: two do.
    """
    for key in ("step", "global_step"):
        named = {each[key].strip(): file.name for each, file in zip(metadata, parts.files, strict=True) if key in each}
        if len(named) > 1:
            (first, one), (second, other) = list(named.items())[:2]
            raise BeingRewritten(
                f"{parts.path} holds files of two saves: {one} is of step {first:.40}, and {other} of step "
                f"{second:.40}. Wait for its writer to finish, or write it again."
            )
