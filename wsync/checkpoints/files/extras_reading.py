"""Reads the extras of a checkpoint, under the checks that its weights pass: complete, of one save, digest, bounded."""

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
        infos: of ``parts.every``.
        published: identities of what was published from this path before.

    Raises:
        IncompleteCheckpoint: one is missing.
        MalformedCheckpoint: they are too large.
        CheckpointError: one is a link to another user's file elsewhere.
        BeingRewritten: see ``settling.check_extras``.
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
            "Name fewer files in extras.files, or raise it."
        )
    for file, info in zip(parts.extras.values(), infos[len(parts.own) :], strict=True):
        if info.st_uid != infos[0].st_uid and _leads_away(file, parts.files[0].parent):
            raise CheckpointError(
                f"{file} is a link out of {parts.files[0].parent} to a file that has another owner than the weights. "
                "Policies would be given what its writer may not even read: copy the file to its place."
            )
    settling.check_extras(parts, infos, settle, published)


def _leads_away(file: Path, directory: Path) -> bool:
    return not remote(file) and not os.path.realpath(file).startswith(f"{os.path.realpath(directory)}/")


def read_extras(source: ByteSource, metadata: Mapping[str, str], *, digests: bool) -> Extras:
    """Reads the extras of an open checkpoint.

    Args:
        metadata: of its headers, which travel with them.
        digests: compare each with the digest that its writer left; else with the store's, where it has one.

    Raises:
        IncompleteCheckpoint: one is cut off.
        MalformedCheckpoint: one is not the safetensors file that its name says.
        WrongDigest, BeingWritten: see ``digest``.
        CheckpointError: the system could not read one.
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
    """Raises CheckpointError where a file of a known kind is cut off."""
    if file.name.endswith(SUFFIX):
        read_header(lambda nbytes, start: data[start : start + nbytes], len(data), file, 0)
    elif file.name.endswith(".json"):
        try:
            json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise IncompleteCheckpoint(
                f"{file} is not JSON, or is cut off. Wait for its writer to finish, or write it again."
            ) from exc
