"""The policy spec: settings read without running anything, and each way a user's code can fail told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import write
from policies import mlp
from processes import DEADLINE
from torch import nn

from wsync.errors import SpecError, UsageError, WsyncError
from wsync.layout.layout import layout_of
from wsync.segment.segment_files import SLOTS
from wsync.settings.layout_process import layout_of_spec
from wsync.settings.spec import Spec, load_spec
from wsync.settings.user_code import build, read_layout

NETS = '''
import torch
from torch import nn

built = []


class Net(nn.Module):
    """Tells the device that it was made on."""

    def __init__(self, hidden=4, depth=1):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(hidden, hidden) for _ in range(depth)))
        built.append(self.body[0].weight.device.type)


class Choosy(Net):
    """Looks at its own values, which tensors of the meta device do not have."""

    def __init__(self):
        super().__init__()
        if float(self.body[0].weight.detach().abs().sum()) < 0:
            raise AssertionError


class Zoo:
    make = Net


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LazyLinear(2)


def make_policy(**kwargs):
    print("made")
    return Net(**kwargs)


def fails(**kwargs):
    raise LookupError("no such environment")


def leaves():
    raise SystemExit("usage: train.py ENV")


def returns_nothing():
    pass


instance = Net()
table = torch.zeros(3)
number = 42
'''


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's project, with modules good and bad; what was imported from it is forgotten after the test."""
    known, path = set(sys.modules), list(sys.path)
    files = {
        "nets.py": NETS,
        "package/__init__.py": "",
        "package/nets.py": NETS,
        "needs_other.py": "import a_package_that_nobody_has\n",
        "needs_own.py": "from package import nets\nimport package.missing\n",
        "broken.py": "def make(:\n",
        "raising.py": "import os\nos.environ['A_VARIABLE_THAT_NOBODY_SET']\n",
        "exiting.py": "import sys\nsys.exit(3)\n",
        "importing.py": "from package.nets import no_such_name\n",
        "talking.py": "print('hello from the module')\nfrom package.nets import make_policy\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def toml(directory: Path, text: str, name: str = "cartpole.toml") -> str:
    (directory / name).write_text(text)
    return str(directory / name)


# Settings


def test_an_import_string_alone_has_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what a bare import string means: its name is that of the segment, the current directory is importable."""
    monkeypatch.chdir(tmp_path)
    spec = load_spec("train.nets:Zoo.make")
    assert spec == Spec("train.nets:Zoo.make", "train.nets.Zoo.make", tmp_path, origin="train.nets:Zoo.make")
    assert (spec.policy_kwargs, spec.checkpoints, spec.poll, spec.slots) == ({}, None, 1.0, SLOTS)


def test_a_toml_file_alone_has_defaults(tmp_path: Path) -> None:
    """Guards that a TOML file needs only the policy, and takes its own name for the segment."""
    path = toml(tmp_path, 'policy = "nets:Net"')
    assert load_spec(path) == Spec("nets:Net", "cartpole", tmp_path, origin=path)


def test_a_toml_file_says_it_all(tmp_path: Path) -> None:
    """Guards that every documented setting arrives, paths relative to the TOML and never to the current directory."""
    text = """
        policy = "nets:Net"
        name = "pole"
        checkpoints = "../runs/cartpole"
        slots = 4
        [policy_kwargs]
        hidden = 16
        sizes = [1, 2]
        [watch]
        poll = 5
    """
    (tmp_path / "specs").mkdir()
    spec = load_spec(toml(tmp_path / "specs", text))
    assert (spec.policy, spec.name, spec.slots, spec.poll) == ("nets:Net", "pole", 4, 5.0)
    assert spec.policy_kwargs == {"hidden": 16, "sizes": [1, 2]}
    assert spec.directory == tmp_path / "specs"
    assert spec.checkpoints is not None and spec.checkpoints.is_absolute()
    assert os.path.normpath(spec.checkpoints) == str(tmp_path / "runs" / "cartpole")


def test_a_relative_toml_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a later change of the current directory moves nothing."""
    (tmp_path / "specs").mkdir()
    toml(tmp_path / "specs", 'policy = "nets:Net"\ncheckpoints = "runs"')
    monkeypatch.chdir(tmp_path)
    spec = load_spec(os.path.join("specs", "cartpole.toml"))
    assert (spec.directory, spec.checkpoints) == (tmp_path / "specs", tmp_path / "specs" / "runs")
    absolute = load_spec(toml(tmp_path, 'policy = "nets:Net"\ncheckpoints = "/data/runs"'))
    assert absolute.checkpoints == Path("/data/runs")


@pytest.mark.parametrize("text", ["nets:Net", "cartpole.toml"])
def test_a_given_name_comes_first(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that ``--name`` overrides the spec's own."""
    toml(tmp_path, 'policy = "nets:Net"\nname = "pole"')
    monkeypatch.chdir(tmp_path)
    assert load_spec(text, name="other").name == "other"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-x", "a b", "x" * 300])
def test_a_name_that_cannot_be_a_directory_is_refused(name: str) -> None:
    """Guards that no name leads out of the runtime directory."""
    with pytest.raises(UsageError, match="name") as caught:
        load_spec("nets:Net", name=name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "nets", "nets:", ":Net", "nets:Net:x", "nets.Net", "a/b:Net", "nets:a-b", "1a:b", "a..b:c"]
)
def test_what_names_no_policy_is_refused(text: str) -> None:
    """Guards that a slip in an import string is told with the form that is wanted."""
    with pytest.raises(SpecError, match=r"package\.module:attr") as caught:
        load_spec(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('policy = "nets:Net"\nchekpoints = "runs"', r"unknown key 'chekpoints'.*'checkpoints'"),
        ('policy = "nets:Net"\n[watch]\npol = 1', r"unknown key 'watch\.pol'.*'watch\.poll'"),
        ('policy = "nets:Net"\nzzz = 1', r"unknown key 'zzz'.*policy"),
        ("policy = 3", r"policy = 3 is not a string\. Correct it"),
        ('policy = "nets:Net"\nslots = "3"', r"slots = '3' is not a whole number"),
        ('policy = "nets:Net"\nslots = true', r"slots = True is not a whole number"),
        ('policy = "nets:Net"\ncheckpoints = ["a"]', r"checkpoints = .* is not a string"),
        ('policy = "nets:Net"\ncheckpoints = "a\\u0000"', r"checkpoints = 'a\\x00' holds a NUL"),
        ('policy = "nets:Net"\n[select]\nmarker = "\\u0000"', r"select\.marker.* holds a NUL"),
        ('policy = "nets:Net"\npolicy_kwargs = 1', r"policy_kwargs = 1 is not a table"),
        ('policy = "nets:Net"\nwatch = 1', r"watch is a table.*\[watch\]"),
        ('policy = "nets:Net"\n[watch]\npoll = "1"', r"watch\.poll = '1' is not a number"),
        ('policy = "nets:Net"\n[watch]\npoll = 0', r"watch\.poll = 0"),
        ('policy = "nets:Net"\n[watch]\npoll = -1.5', r"watch\.poll = -1\.5"),
        ('policy = "nets:Net"\n[watch]\npoll = nan', r"watch\.poll = nan"),
        ('name = "pole"', r"does not say which policy.*package\.module:attr"),
        ('policy = "nets"', r"'nets' does not name a policy"),
        ('policy = "nets:Net', r"is not TOML: .*"),
        ("policy = 1\npolicy = 2", r"is not TOML"),
    ],
)
def test_a_wrong_setting_is_told(text: str, words: str, tmp_path: Path) -> None:
    """Guards that each wrong setting is a SpecError that says which, what it is and what is wanted."""
    with pytest.raises(SpecError, match=words) as caught:
        load_spec(toml(tmp_path, text))
    assert caught.value.exit_code == 2


def test_a_toml_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Guards files that are missing, directories or not UTF-8: a SpecError that names the path."""
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'policy = "\xe9"')
    for name in ("missing.toml", "directory.toml", "latin.toml"):
        with pytest.raises(SpecError, match=name):
            load_spec(str(tmp_path / name))


def test_a_poll_without_end_is_refused(tmp_path: Path) -> None:
    """Guards that TOML's inf does not reach the clock."""
    with pytest.raises(SpecError, match="poll"):
        load_spec(toml(tmp_path, 'policy = "nets:Net"\n[watch]\npoll = inf'))


def test_reading_settings_runs_and_imports_nothing(runtime: Path, train: Path) -> None:
    """Guards that a pass with nothing to do pays for no torch, and that no user's code runs for it."""
    toml(train, 'policy = "exiting:Net"\ncheckpoints = "runs"')
    code = (
        "import sys; from wsync.settings.spec import load_spec\n"
        "load_spec('cartpole.toml').fingerprint(); load_spec('nets:Net')\n"
        "print([name for name in ('torch', 'tensordict', 'numpy', 'exiting', 'nets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=train, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# The user's code


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("no_such_module:Net", r"there is no module 'no_such_module'"),
        ("no_such.module:Net", r"there is no module 'no_such\.module' \(no 'no_such'\)"),
        ("package.net:Net", r"there is no module 'package\.net'"),
        ("nets.deeper:Net", r"there is no module 'nets\.deeper'"),
        ("needs_other:Net", r"'needs_other' exists.*own import failed.*a_package_that_nobody_has.*needs_other\.py:1"),
        ("needs_own:Net", r"'needs_own' exists.*own import failed.*package\.missing.*needs_own\.py:2"),
        ("broken:Net", r"'broken' exists.*own import failed.*SyntaxError"),
        ("raising:Net", r"'raising' exists.*own import failed.*KeyError.*A_VARIABLE.*"),
        ("exiting:Net", r"'exiting' exists.*own import failed.*SystemExit.*exiting\.py:2"),
        ("importing:Net", r"'importing' exists.*own import failed.*no_such_name.*importing\.py:1"),
        ("nets:make_polciy", r"no attribute 'make_polciy'.*'make_policy'"),
        ("nets:Zoo.mak", r"no attribute 'Zoo\.mak'.*'make'"),
        ("nets:zzzzzz", r"no attribute 'zzzzzz'.*spelling"),
        ("nets:number", r"is a int, not a policy"),
        ("nets:table", r"is a Tensor, not a policy"),
        ("nets:fails", r"failed when it was called.*LookupError.*no such environment.*nets\.py:\d+"),
        ("nets:leaves", r"failed when it was called.*SystemExit.*usage"),
        ("nets:returns_nothing", r"returned a NoneType, not an nn\.Module"),
        ("nets:Zoo", r"returned a Zoo, not an nn\.Module"),
    ],
)
def test_each_failure_of_the_users_code_is_told_apart(policy: str, words: str, train: Path) -> None:
    """Guards that a user is told where the fault is: spelling, installation, own module, or what it makes."""
    spec = load_spec(policy)
    for use in (build, read_layout):
        with pytest.raises(SpecError, match=f"(?s){words}") as caught:
            use(spec)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("nets:instance", r"nets:instance is already a module.*policy_kwargs"),
        ("nets:returns_nothing", r"failed when it was called with {'hidden': 3}.*TypeError"),
        ("nets:fails", r"{'hidden': 3}.*LookupError"),
    ],
)
def test_wrong_arguments_are_told(policy: str, words: str, train: Path) -> None:
    """Guards that policy_kwargs that cannot be used are named in the message."""
    spec = load_spec(toml(train, f'policy = "{policy}"\n[policy_kwargs]\nhidden = 3'))
    with pytest.raises(SpecError, match=words):
        build(spec)


@pytest.mark.parametrize("policy", ["nets:Net", "nets:make_policy", "nets:Zoo.make", "package.nets:Net"])
def test_a_policy_is_built_with_its_arguments(policy: str, train: Path) -> None:
    """Guards that a class, a function, a nested attribute and a module of a package all give the policy."""
    spec = load_spec(toml(train, f'policy = "{policy}"\n[policy_kwargs]\nhidden = 3\ndepth = 2'))
    built = build(spec)
    assert isinstance(built, nn.Module)
    assert [tuple(t.shape) for t in built.state_dict().values()] == [(3, 3), (3,)] * 2
    assert read_layout(spec) == layout_of(built)


def test_the_layout_is_read_on_the_meta_device(train: Path) -> None:
    """Guards that the layout of a policy of any size costs no memory, while build() gives a real one."""
    spec = load_spec("nets:Net")
    read_layout(spec)
    assert sys.modules["nets"].built[1:] == ["meta"]  # the first is the module's own instance
    assert not any(t.is_meta for t in build(spec).parameters())
    assert torch.get_default_device().type == "cpu"


def test_a_policy_that_looks_at_its_values_is_really_built(train: Path) -> None:
    """Guards the way back to a real build where the meta device does not do."""
    layout = read_layout(load_spec("nets:Choosy"))
    assert sys.modules["nets"].built[1:] == ["meta", "cpu"]
    assert [e.name for e in layout.tensors] == ["body.0.bias", "body.0.weight"]


def test_a_module_instance_stays_real(train: Path) -> None:
    """Guards that what a user's module makes at import never lands on the meta device."""
    spec = load_spec("nets:instance")
    layout = read_layout(spec)
    policy = build(spec)
    assert policy is sys.modules["nets"].instance
    assert not any(t.is_meta for t in policy.parameters())
    assert layout == layout_of(policy)


def test_a_lazy_policy_is_refused(train: Path) -> None:
    """Guards that a policy without shapes is told as such, also after the second try."""
    with pytest.raises(SpecError, match="lazy"):
        read_layout(load_spec("nets:Lazy"))


def test_an_attribute_that_fails_when_it_is_looked_up(train: Path) -> None:
    """Guards modules whose own __getattr__ imports what it gives, and fails."""
    (train / "deferred.py").write_text("def __getattr__(name):\n    import a_package_that_nobody_has\n")
    with pytest.raises(SpecError, match="a_package_that_nobody_has"):
        build(load_spec("deferred:Net"))


def test_the_users_prints_go_to_stderr(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards that stdout, which carries our JSON, is not the user's."""
    spec = load_spec("talking:make_policy")
    read_layout(spec)
    build(spec)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello from the module" in err and "made" in err
    print("ours")
    assert capsys.readouterr().out == "ours\n"


# A process of its own


def test_a_layout_is_read_in_a_process_of_its_own(
    runtime: Path, train: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards that layout() gives what read_layout() gives, leaves no import here, and sees the code as it is now."""
    spec = load_spec(toml(train, 'policy = "talking:make_policy"\n[policy_kwargs]\nhidden = 3'))
    first = layout_of_spec(spec)
    assert "talking" not in sys.modules
    out, err = capfd.readouterr()
    assert out == "" and "hello from the module" in err
    assert [e.shape for e in first.tensors] == [(3,), (3, 3)]
    (train / "talking.py").write_text("from package.nets import Net\ndef make_policy(hidden): return Net(hidden, 2)\n")
    assert layout_of_spec(spec) == read_layout(spec) != first


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("nets:make_polciy", r"no attribute 'make_polciy'.*'make_policy'"),
        ("dying:Net", r"dying:Net ended with status 9 and no answer"),
    ],
)
def test_an_error_comes_out_of_the_process(policy: str, words: str, runtime: Path, train: Path) -> None:
    """Guards that a SpecError of the other process is told here as it is, and so is a death without a word."""
    (train / "dying.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(SpecError, match=words):
        layout_of_spec(load_spec(policy))


@pytest.mark.parametrize("gate", [[], ["--gate", "policies:mlp"]], ids=["layout", "gate"])
def test_no_memory_for_torch_is_nobodys_mistake(gate: list[str], runtime: Path, train: Path) -> None:
    """Guards a checkpoint, and its spec, against being blamed for a limit in which torch cannot be loaded."""
    push = [sys.executable, "-m", "wsync", "push", "policies:mlp", str(write(train / "a.safetensors", mlp(), 1.0))]
    if gate:  # the segment is there
        assert subprocess.run(push, cwd=train, capture_output=True).returncode == 0
        push += ["--force", *gate]
    limited = ["/bin/sh", "-c", 'ulimit -v 250000; exec "$@"', "sh", *push]
    done = subprocess.run(limited, cwd=train, capture_output=True, text=True)
    assert done.returncode == 1 and "torch cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_a_layout_whose_process_was_killed_is_no_wrong_spec(runtime: Path, train: Path) -> None:
    """Guards a watch against ending with a usage error where the kernel ran out of memory."""
    (train / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(WsyncError, match="status -9") as caught:
        layout_of_spec(load_spec("killed:Net"))
    assert not isinstance(caught.value, UsageError)


def test_what_the_process_writes_past_python_harms_nothing(runtime: Path, train: Path) -> None:
    """Guards the answer against what user code, its libraries or its children put on the descriptor itself."""
    acts = "os.write(1, b'loud'); sys.__stdout__.write('loud'); os.system('echo loud'); atexit.register(print, 'loud')"
    (train / "loud.py").write_text(f"import atexit, os, sys\nfrom package.nets import Net\n{acts}\n")
    assert len(layout_of_spec(load_spec("loud:Net")).tensors) == 2


# Fingerprint


def test_the_fingerprint_tells_policies_apart(train: Path) -> None:
    """Guards that policy, arguments and directory each reach the fingerprint, and the rest of the settings do not."""
    (train / "other").mkdir()
    specs = [
        Spec("nets:Net", "a", train),
        Spec("nets:Choosy", "a", train),
        Spec("nets:Net", "a", train / "other"),
        Spec("nets:Net", "a", train, {"hidden": 1}),
        Spec("nets:Net", "a", train, {"hidden": 2}),
        Spec("installed:Net", "a", train),
        Spec("installed:Net", "a", train / "other"),
    ]
    assert len({spec.fingerprint() for spec in specs}) == len(specs)
    assert Spec("nets:Net", "b", train, {}, train / "runs", 9.0, 5).fingerprint() == specs[0].fingerprint()


@pytest.mark.parametrize(
    "policy",
    [
        "nets:Net",
        "package.nets:Net",
        "package:Net",
    ],
)
def test_the_fingerprint_follows_the_modules_file(policy: str, train: Path) -> None:
    """Guards that an edited module is read again: a new time, or a new file, under the same name."""
    spec = load_spec(policy)
    file = train.joinpath(*policy.partition(":")[0].split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    seen = [spec.fingerprint(), spec.fingerprint()]
    os.utime(file, (1, 1))
    seen.append(spec.fingerprint())
    (train / "new.py").write_text(file.read_text())
    os.utime(train / "new.py", (1, 1))
    (train / "new.py").replace(file)
    seen.append(spec.fingerprint())
    assert seen[0] == seen[1] and len(set(seen)) == 3
