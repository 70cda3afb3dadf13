"""The map of the package in its docstring: every room is on it, and imports go the way that it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import wsync

PACKAGE = Path(wsync.__file__).parent


def rooms() -> list[str]:
    """The rooms as the map names them, from the ground up."""
    assert wsync.__doc__
    lines = [line for line in wsync.__doc__.splitlines() if line.startswith("    ")]
    return [name for line in lines for name in re.findall(r"\w+", line[20:])]


def imported(room: str) -> set[str]:
    """What a room imports of the package when it is imported itself; not what it does within a function."""
    found = set()
    folder = PACKAGE / room
    for file in folder.glob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        tree, level = ast.parse(file.read_text()), 2 if folder.is_dir() else 1
        for node in [inner for outer in tree.body for inner in (outer.body if isinstance(outer, ast.Try) else [outer])]:
            if isinstance(node, ast.ImportFrom) and node.level == level:
                found |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in found if name} & there()


def there() -> set[str]:
    """The rooms that there are: modules, and packages of several."""
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    return modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_every_room_is_on_the_map() -> None:
    """Guards a map that the next reader can believe: each module once, and nothing that is not there."""
    assert sorted(rooms()) == sorted(there())


def test_imports_go_down_the_map() -> None:
    """Guards against a knot of rooms: what a room imports stands before it, and nothing imports the command line."""
    order = {room: place for place, room in enumerate(rooms())}
    assert not [(room, low) for room in order for low in imported(room) if order[low] > order[room]]
