"""The rooms as their ``__init__`` tells them: what others may use, and what belongs to a room alone."""

import importlib
import tomllib
from pathlib import Path

import pytest
from builders import ROOT

ROOMS = sorted(file.parent for file in (ROOT / "wsync").rglob("*/__init__.py"))
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PROTECTED = {module for contract in CONTRACTS for module in contract.get("protected_modules", [])}


@pytest.mark.parametrize("directory", ROOMS, ids=lambda directory: str(directory.relative_to(ROOT)))
def test_a_room_exports_what_others_may_import(directory: Path) -> None:
    """Guards that a new module is either named in ``__all__``, or closed to other rooms by the import contract."""
    room = ".".join(directory.relative_to(ROOT).parts)
    modules = {file.stem for file in directory.iterdir() if (file.suffix == ".py" or (file / "__init__.py").exists())}
    closed = {name for name in modules if f"{room}.{name}" in PROTECTED}
    exported = set(importlib.import_module(room).__all__)
    assert exported | closed == modules - {"__init__"} and not exported & closed
