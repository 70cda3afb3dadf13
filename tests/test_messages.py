"""What wsync raises: one tree, and messages that say what happened, to what, and what to do next."""

import ast
import re
from pathlib import Path

from wsync import errors

WSYNC = Path(errors.__file__).parent
TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WsyncError)]


def _words(node: ast.expr) -> str:
    """The text of a message, with … for each value in it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(_words(part) for part in node.values)
        case ast.BinOp():
            return _words(node.left) + _words(node.right)
        case _:
            return "…"


def _messages(path: Path) -> list[tuple[int, str, str]]:
    """The messages that a module writes out where it makes an error: line, class, text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            kind, text = getattr(errors, node.func.id, None), _words(node.args[0])
            if kind in TREE and text.strip("… "):
                found.append((node.lineno, node.func.id, text))
    return found


def test_each_message_says_what_to_do_next() -> None:
    """A message says what happened, and then, in a clause of its own, what to do or that nothing need be done."""
    second = re.compile(r"(.[.;:)]|…) ?['`(A-Z…]|[;:] \w")
    messages = [(path.name, *row) for path in sorted(WSYNC.rglob("*.py")) for row in _messages(path)]
    assert len(messages) > 150
    assert not [row for row in messages if not second.search(row[-1])]


def test_the_tree_in_the_documentation_is_the_tree() -> None:
    """Each class stands in the module's table with its exit code, below its parent."""
    above: list[str] = []
    shown = {}
    for line in (errors.__doc__ or "").splitlines():
        if row := re.fullmatch(r"    ([│├└─ ]*)([A-Z]\w+) +(\d+) +\S.*", line):
            above[len(row[1]) // 4 :] = [row[2]]
            shown[row[2]] = (int(row[3]), above[-2] if len(above) > 1 else "Exception")
    public = [kind for kind in TREE if kind is not errors.WithDifferences]
    assert shown.keys() == {kind.__name__ for kind in public}
    for kind in public:
        code, parent = shown[kind.__name__]
        assert kind.exit_code == code
        assert parent in {base.__name__ for base in kind.__mro__[1:]}


def test_each_class_is_raised() -> None:
    """No class of the tree is left over from code that is gone."""
    sources = " ".join(path.read_text(encoding="utf-8") for path in WSYNC.rglob("*.py") if path.name != "errors.py")
    roots = {kind for kind in TREE if kind.__subclasses__()}
    unused = [kind.__name__ for kind in TREE if kind not in roots and not re.search(rf"\b{kind.__name__}\b", sources)]
    assert not unused
