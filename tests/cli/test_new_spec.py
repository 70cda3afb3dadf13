"""What helps with typing: a new TOML, and what the shell completes."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from others import run_cli

from wsync.cli.options import specs, versions
from wsync.cli.output.config import spec_text
from wsync.history.state import State
from wsync.settings.spec import KEYS, load_spec


def test_a_new_spec_holds_every_setting_and_its_default(runs: Path) -> None:
    """Each commented setting is one that the spec takes, and those with a default change nothing when they are set."""
    Path("plain.toml").write_text('policy = "policies:mlp"\nname = "x"\ncheckpoints = "checkpoints"\n')
    text = spec_text("policies:mlp").replace("#group", "##group")
    text = re.sub(r"^#(?=[a-z])", "", text, flags=re.M)
    Path("full.toml").write_text(text.replace('name = "cartpole"', 'name = "x"'))
    full, plain = load_spec("full.toml"), load_spec("plain.toml")
    shown = tomllib.loads(Path("full.toml").read_text())
    known = {key: kind.keys() if isinstance(kind, dict) else () for key, kind in KEYS.items() if key != "group"}
    assert {key: value.keys() if isinstance(value, dict) and key != "policy_kwargs" else () for key, value in
            shown.items()} == known  # fmt: skip
    for field in fields(plain):
        if field.name not in ("access", "origin", "metrics"):
            assert getattr(full, field.name) == getattr(plain, field.name), field.name


def test_a_new_spec_is_written_once(runs: Path) -> None:
    """A path gets the file, an import string the text; a file that is there is left alone."""
    code, out, _ = run_cli("config", "nets/actor.toml", "--init")
    assert code == 2 and not out
    code, out, _ = run_cli("config", "actor.toml", "--init")
    assert code == 0 and "actor.toml: written" in out and "[select]" in Path("actor.toml").read_text()
    Path("actor.toml").write_text("mine")
    code, _, err = run_cli("config", "actor.toml", "--init")
    assert code == 2 and "not overwritten" in err and Path("actor.toml").read_text() == "mine"
    assert 'policy = "nets:actor"' in run_cli("config", "nets:actor", "--init")[1]


def test_specs_and_versions_are_completed(runs: Path) -> None:
    """A TOML, a directory on the way to one, and the versions on record with what they are, newest first."""
    Path("nets").mkdir()
    for name in ("nets/actor.toml", "actor.toml", "notes.md", ".hidden.toml"):
        Path(name).touch()
    assert specs("") == ["actor.toml", "nets/", "runs/"] and specs("nets/a") == ["nets/actor.toml"]
    assert specs("absent/") == [] and specs(".h") == [".hidden.toml"]
    with State("actor") as state:
        for version in (1, 2, 12):
            state.record("publish", version=version, step=version * 10, checkpoint=f"/runs/step_{version}")
    context: Any = SimpleNamespace(params={"name": "actor"})
    assert versions(context, "1") == [("12", "step 120, step_12"), ("1", "step 10, step_1")]
    assert versions(SimpleNamespace(params={}, args=[]), "") == []  # type: ignore[arg-type]


@pytest.mark.parametrize("panel", ["Keep in step", "Look", "Go back", "Measure"])
def test_help_is_in_panels_by_purpose(panel: str) -> None:
    """Guards that a new command finds its place."""
    _, out, _ = run_cli("--help")
    assert f" {panel} " in out and " Commands " not in out
