"""A checkpoint's step: the producer's own number, read from the metadata or from the name.

Trainers write more than one number into a name (``ckpt-500-loss0.25``, ``policy_step_500_seed_1``), so the number after
a word such as ``step`` or ``checkpoint`` wins over all others. This module is pure: it opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..layout.filenames import SUFFIX

_METADATA = ("step", "global_step")
_STATED = re.compile(r"(-?\d{1,19})(?:\.0*)?")
_GAP = r"[ _.=:\-]*"
_COUNT = r"(\d+(?:\.\d+)?(?:e\d+|[km])(?![a-z\d])|\d+)"  # 500, 10k, 1.5M, 1e6
_WORDS = (  # the first that matches wins
    re.compile(rf"steps?{_GAP}{_COUNT}", re.IGNORECASE),
    re.compile(rf"{_COUNT}[ _\-]?(?:time)?steps(?![a-z])", re.IGNORECASE),  # as stable-baselines3 writes it
    re.compile(rf"(?<![a-z])iter(?:ation)?s?{_GAP}{_COUNT}", re.IGNORECASE),
    re.compile(rf"(?:checkpoint|ckpt){_GAP}{_COUNT}", re.IGNORECASE),
    re.compile(rf"epochs?{_GAP}(\d+)", re.IGNORECASE),
)
_DECIMAL = re.compile(r"\d+\.\d+")
_LIGHTNING = re.compile(r"-v\d+$")  # Lightning appends it if a file of that name exists
_FIXED = re.compile(  # what libraries call the file, whatever the step
    r"(?:adapter_model|diffusion_pytorch_model|open_clip_model|model)(?:_\d+)?\.safetensors(?:\.index\.json)?"
)
_DIGITS = re.compile(r"(\d+)")
_MOST = 1 << 63


class Step(NamedTuple):
    """A step, and where it was read.

    Attributes:
        number: the step; None if there is none.
        source: where it was read, in words; empty if there is no number.
        others: the other numbers in the name, if the step is from the name.
        certain: whether the name leaves no doubt: the number follows a known word, or is the only one.
    """

    number: int | None
    source: str = ""
    others: tuple[str, ...] = ()
    certain: bool = True


def read_step(name: str, metadata: Mapping[str, str], pattern: str = "") -> Step:
    """Reads the step from the metadata, or from the name if they state none.

    Args:
        pattern: ``select.step``; if it is set, only its match in the name counts.
    """
    return step_in_name(name, pattern) if pattern else step_in_metadata(metadata) or step_in_name(name)


def step_at(path: Path, metadata: Mapping[str, str], pattern: str = "") -> Step:
    """Reads the step of the checkpoint at a path: from the metadata, else its name, else a directory above it.

    A file with a fixed name, such as ``model.safetensors`` or ``model_1.safetensors``, takes the step of its directory.
    The two directories above count only if their names are a step and nothing else, as in ``000100/pretrained_model``
    and ``checkpoint-1/policy/actor``.
    """
    if not pattern and (stated := step_in_metadata(metadata)):
        return stated
    names = [path.name, path.parent.name, path.parent.parent.name]
    if pattern:
        steps = [step_in_name(name, pattern) for name in names]
    elif is_fixed(path.name):
        names = [*names[1:], path.parent.parent.parent.name]
        steps = [step_in_name(name) for name in names if names_a_step(name)]
        steps += map(step_in_name, (path.name, names[0]))
    else:
        steps = [step_in_name(path.name), *(step_in_name(name) for name in names[1:] if names_a_step(name))]
    return next((step for step in steps if step.number is not None), Step(None))


def step_in_metadata(metadata: Mapping[str, str]) -> Step | None:
    """The step that the metadata state, as in ``"500"`` and ``"500.0"``; None if they state none."""
    for key in _METADATA:
        if (stated := _STATED.fullmatch(metadata.get(key, "").strip())) and abs(int(stated[1])) < _MOST:
            return Step(int(stated[1]), f"metadata {key!r}")
    return None


def step_in_name(name: str, pattern: str = "") -> Step:
    """The number after ``step``, ``iter``, ``checkpoint`` or ``epoch``, in this order; else the name's last integer."""
    if pattern:
        found = expression(pattern).search(name)
        digits = next((group for group in found.groups() if group), "") if found else ""
        digits = re.sub("[_,']", "", digits)  # as in 1_000_000
        return Step(_number(digits), f"name, by {pattern}") if digits.isdecimal() else Step(None)
    stem = _LIGHTNING.sub("", name.removesuffix(SUFFIX))
    digits = re.findall(r"\d+", stem)
    for word in _WORDS:
        if found := word.search(stem):
            number, certain = _counted(found[1].lower())
            return Step(number, f"name, {found[0]!r}", _others(digits, found[1]), certain)
    if not digits:
        return Step(None)
    last = (re.findall(r"\d+", _DECIMAL.sub("", stem)) or digits)[-1]
    return Step(_number(last), "name, its last integer", _others(digits, last), certain=len(digits) == 1)


def step_by_shape(name: str) -> int | None:
    """The step that ``step_in_name`` reads; None if that is not certain.

    Names that differ only in their numbers have the step at the same place. The place is worked out once, because there
    may be 100,000 such names.
    """
    parts = _DIGITS.split(name)
    at, factor = _place_of_step(tuple(parts[::2]))
    return _number(parts[at]) * factor if at else None


def steps_like(name: str) -> Callable[[str], int | None]:
    """Returns a ``step_by_shape`` that is twice as fast for names that differ from this one only in their numbers."""
    texts = tuple(_DIGITS.split(name)[::2])
    at, factor = _place_of_step(texts)
    numbers = [r"(\d+)" if 2 * number + 1 == at else r"\d+" for number in range(len(texts) - 1)]
    alike = re.compile("".join(re.escape(text) + number for text, number in zip(texts, [*numbers, ""], strict=True)))
    match = alike.fullmatch if at else lambda _: None

    def step(name: str) -> int | None:
        return _number(found[1]) * factor if (found := match(name)) else step_by_shape(name)

    return step


@lru_cache(maxsize=1024)
def _place_of_step(texts: tuple[str, ...]) -> tuple[int, int]:
    """The step's index among these texts and the numbers between them, and its unit; index 0 if that is uncertain."""
    probes = [str(1000 + at) for at in range(len(texts) - 1)]
    step = step_in_name("".join(part for pair in zip(texts, [*probes, ""], strict=True) for part in pair))
    for at, probe in enumerate(probes):
        for factor in (1, 1_000, 1_000_000):
            if step.certain and step.number == int(probe) * factor:
                return 2 * at + 1, factor
    return 0, 1


def is_fixed(name: str) -> bool:
    """Whether libraries use this name at every step: ``model.safetensors``, ``model_1.safetensors``."""
    return _FIXED.fullmatch(name) is not None


def names_a_step(name: str) -> bool:
    """Whether a directory is named after a step and nothing else: ``000100``, ``step_5``, ``checkpoint-500``."""
    step = step_in_name(name)
    return name.isdecimal() or (not step.others and step.source not in ("", "name, its last integer"))


@lru_cache(maxsize=8)
def expression(pattern: str) -> re.Pattern[str]:
    """Compiles ``select.step``: a regular expression between slashes.

    Raises:
        UsageError: it is not a regular expression, or has no group.
    """
    try:
        if len(pattern) < 3 or not pattern[0] == pattern[-1] == "/":
            raise re.error("it does not stand between slashes")
        compiled = re.compile(pattern[1:-1])
        if not compiled.groups:
            raise re.error("it has no group")
    except re.error as exc:
        raise UsageError(
            f"select.step: {pattern!r} is not a regular expression with a group ({exc}). Write it between slashes, "
            "with the number in parentheses, such as '/step_([0-9]+)/'."
        ) from exc
    return compiled


def _number(digits: str) -> int:
    number = int(digits)  # 19 digits or more may be a time in nanoseconds: the last 18 are kept
    return number if number < _MOST else int(digits[-18:])


def _counted(text: str) -> tuple[int, bool]:
    """Reads 500, 10k, 1.5m or 1e6 as a number; also returns whether it can be read in only one way."""
    digits, _, exponent = text.rstrip("km").partition("e")
    whole, _, part = digits.partition(".")
    unit = int(exponent) if exponent else {"k": 3, "m": 6}.get(text[-1], 0)
    if unit < len(part) or unit > 18 or (exponent and len(whole) > 1) or (unit and len(whole) > 9):
        return _number(whole), not part and not exponent
    return _number(whole + part + "0" * (unit - len(part))), not part and not exponent


def _others(digits: list[str], taken: str) -> tuple[str, ...]:
    rest = list(digits)
    for each in _DIGITS.findall(taken):
        rest.remove(each)
    return tuple(rest)
