"""Reads a checkpoint's extras with the checks that its weights get: complete, of one save, digests, bounded size."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import CheckpointError, IncompleteCheckpoint, MalformedCheckpoint
from ...fitting.header import read_header
from ...layout.filenames import SUFFIX
from . import settling
from .digest import digest_of
from .extras import Extras
from .parts import Parts, remote, unreadable
from .source import ByteSource


def check_extras(parts: Parts, infos: Sequence[os.stat_result], settle: float, published: Sequence[str]) -> None:
    """Checks that all extras are there, small enough, and of the same save as the weights.

    Args:
        infos: stat results of ``parts.every``.
        settle: see ``settling.check_extras_settled``.
        published: identities of what was published from this path before.

    Raises:
        IncompleteCheckpoint: an extra is missing.
        MalformedCheckpoint: the extras are too large.
        CheckpointError: an extra is a link out of the checkpoint's directory, to another user's file.
        BeingRewritten: see ``settling.check_extras_settled``.
    """
    if pattern := parts.wanted.missing(parts.extras):
        raise IncompleteCheckpoint(
            f"{parts.path} is incomplete: no file matches {pattern!r} of extras.files. Wait for its writer, or correct "
            "[extras] in the TOML."
        )
    size, most = sum(info.st_size for info in infos[len(parts.own) :]), parts.wanted.max_bytes
    if size > most:
        raise MalformedCheckpoint(
            f"{parts.path} has {len(parts.extras)} extras of {size:,} bytes in all, and extras.max_bytes is {most:,}. "
            "Name fewer files in extras.files, or raise extras.max_bytes."
        )
    for file, info in zip(parts.extras.values(), infos[len(parts.own) :], strict=True):
        if info.st_uid != infos[0].st_uid and _leads_away(file, parts.files[0].parent):
            raise CheckpointError(
                f"{file} is a link out of {parts.files[0].parent} to a file that has another owner than the weights. "
                "It is not read: the weights' owner may have no access to it. Replace the link with a copy of the file."
            )
    settling.check_extras_settled(parts, infos, settle, published)


def _leads_away(file: Path, directory: Path) -> bool:
    return not remote(file) and not os.path.realpath(file).startswith(f"{os.path.realpath(directory)}/")


def read_extras(source: ByteSource, metadata: Mapping[str, str], *, digests: bool) -> Extras:
    """Reads the extras of an open checkpoint.

    Args:
        metadata: the checkpoint's own, which travel with the extras.
        digests: whether to compare each extra with the digest that its writer left, not with one of the store.

    Raises:
        IncompleteCheckpoint: an extra is cut off.
        MalformedCheckpoint: an extra is not the safetensors file that its name says.
        WrongDigest, BeingWritten: see ``Digest.check``.
        CheckpointError: the system could not read an extra.
    """
    parts = source.parts
    try:
        files: dict[str, bytes] = {}
        for number, (name, file) in enumerate(parts.extras.items(), len(parts.own)):
            data = files[name] = source.read(number, source.infos[number].st_size, 0)
            if digest := digest_of(file) if digests else source.extra_digests.get(file):
                digest.check(hashlib.sha256(data).hexdigest())
            _check_whole(file, data)
        return Extras(files, metadata)
    except OSError as exc:
        raise unreadable(parts.path, exc) from exc


def _check_whole(file: Path, data: bytes) -> None:
    """Raises a CheckpointError if a safetensors or JSON file is cut off or broken."""
    if file.name.endswith(SUFFIX):
        read_header(lambda nbytes, start: data[start : start + nbytes], len(data), file, 0)
    elif file.name.endswith(".json"):
        try:
            json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise IncompleteCheckpoint(
                f"{file} is not JSON, or is cut off. Wait for its writer to finish, or write it again."
            ) from exc
