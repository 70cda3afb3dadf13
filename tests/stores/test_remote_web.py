"""Checkpoints on a web server and behind ``file://``; URLs that are none, and secrets that stand in URLs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NAME, SPEC, marks, raw, shards, write
from policies import mlp
from processes import DEADLINE, Cli, Lines, Spawn
from safetensors.torch import save_file
from web_server import Web, serve

import wsync
from tests.measure.remote import PEAK, Sender, Server
from wsync.checkpoints.files.extras import ExtraFiles
from wsync.checkpoints.files.parts import place_at
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import CheckpointError
from wsync.fitting.fit import Fit
from wsync.layout.layout import Layout, layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.stores.store import PATIENCE, SCHEMES, Store, Stored
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

pytest.importorskip("obstore")

PASSWORD, SIGNATURE = "pa55-in-the-url", "s1gn4ture"

HASTY = """
from dataclasses import replace
from wsync.cli import commands as cli
from wsync.stores import store
store.PATIENCE = replace(store.PATIENCE, tries=2, pause=0.01)
cli.main()
"""


@pytest.fixture
def web(runtime: Path, tmp_path: Path) -> Iterator[Web]:
    """A server of an empty folder, and a segment."""
    WritableSegment.create(NAME, layout_of(mlp()), spec=load_spec(SPEC).fingerprint()).close()
    with serve(Web(tmp_path)) as served:
        yield served


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, mode="copy"):
        return marks(policy)


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_on_a_web_server_goes_live(web: Web, etags: bool) -> None:
    """One file by its URL is published, is current afterwards, and is new when it changed, with ETags or without."""
    web.etags = etags
    url = f"http://{web.host}/run/policy.safetensors"
    with Syncer(load_spec(SPEC), url) as syncer:
        for mark in (1.0, 2.0):
            file = write(web.folder / "run" / "policy.safetensors", mlp(), mark, int(mark))
            os.utime(file, (mark * 1e9, mark * 1e9))
            assert [syncer.once().status for _ in range(2)] == ["published", "current"]
            assert live_marks() == {mark}


def test_a_sharded_directory_on_a_web_server_goes_live(web: Web) -> None:
    """A directory's URL is the one checkpoint in it: its index is found by name, and its shards by the index."""
    shards(web.folder / "run", mlp(), 5.0)
    with Syncer(replace(load_spec(SPEC), select=Select(settle=0)), f"http://{web.host}/run/") as syncer:
        assert [syncer.once().status for _ in range(2)] == ["published", "current"]
    assert live_marks() == {5.0}


def test_a_named_adapter_on_a_web_server_has_its_configuration(web: Web) -> None:
    """The URL of an adapter's file leads to what lies beside it, and the two together are known again."""
    write(web.folder / "base.safetensors", mlp(), 1.0)
    halves = {f"base_model.model.0.lora_{half}.weight": torch.ones(s) for half, s in (("A", (1, 4)), ("B", (8, 1)))}
    save_file(halves, web.folder / "adapter_model.safetensors")
    (web.folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1, "r": 1}')
    for file in web.folder.iterdir():
        os.utime(file, (1e9, 1e9))
    fit = Fit(base=f"http://{web.host}/base.safetensors")
    spec = replace(load_spec(SPEC), weights=fit, select=Select(settle=0))
    with Syncer(spec, f"http://{web.host}/adapter_model.safetensors") as syncer:
        assert [syncer.once().status for _ in range(2)] == ["published", "current"]
    assert live_marks() == {1.0, 2.0}


def test_a_file_of_this_moment_is_waited_for(web: Web, monkeypatch: Any) -> None:
    """A web server tells two writes within a second apart by nothing: a file that was just written has to stand."""
    asked: list[float] = []
    monkeypatch.setattr("wsync.checkpoints.files.settling.time.sleep", asked.append)
    file = write(web.folder / "x.safetensors", mlp(), 1.0)
    url = f"http://{web.host}/x.safetensors"
    moment = time.time()
    monkeypatch.setattr("wsync.checkpoints.files.settling.time.time", lambda: moment)
    for age, waits in ((0.0, 1), (1.0, 2), (60.0, 2)):
        os.utime(file, (moment - age, moment - age))
        CheckpointWeightGetter(url).open(CheckpointWeightGetter(url).candidates()[0]).close()
        assert len(asked) == waits
    assert all(0 < seconds <= 3 for seconds in asked)


def test_an_index_that_points_elsewhere_reaches_nothing(web: Web) -> None:
    """Names in an index of a web server are asked for beside it, or not at all."""
    (web.folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors", "b": "http://127.0.0.1:1/x"}})
    )
    with Syncer(load_spec(SPEC), f"http://{web.host}") as syncer:
        outcome = syncer.once()
    assert (outcome.status, outcome.version) == ("rejected", 0)
    assert not [path for path in web.paths if "secret" in path or "127" in path]


def test_a_server_without_ranges_is_told(web: Web) -> None:
    """Who gives no ranges cannot be read from, and the message says so; it is not tried in vain for long."""
    web.ranges = False
    os.utime(write(web.folder / "x.safetensors", mlp(), 1.0), (1e9, 1e9))
    with Syncer(load_spec(SPEC), f"http://{web.host}/x.safetensors") as syncer:
        outcome = syncer.once()
    assert outcome.status == "failed" and "it gives no ranges" in (outcome.reason or "")
    assert len(web.paths) == 1


def test_a_url_that_is_signed_for_get_is_read(web: Web) -> None:
    """Guards against looks by HEAD, for which a store's signed URL is refused."""
    web.heads, web.query = False, f"X-Sig={SIGNATURE}"
    os.utime(write(web.folder / "x.safetensors", mlp(), 1.0), (1e9, 1e9))
    with Syncer(load_spec(SPEC), f"http://{web.host}/x.safetensors?{web.query}") as syncer:
        assert [syncer.once().status for _ in range(2)] == ["published", "current"]


def test_an_empty_file_on_a_web_server_is_incomplete(web: Web) -> None:
    """A file of which there is no range is not whole yet, and no failure."""
    (web.folder / "x.safetensors").touch()
    os.utime(web.folder / "x.safetensors", (1e9, 1e9))
    with Syncer(load_spec(SPEC), f"http://{web.host}/x.safetensors") as syncer:
        outcome = syncer.once()
    assert outcome.status != "failed" and "x.safetensors" in (outcome.reason or "")


def test_an_index_replaced_while_it_is_read_is_looked_at_again(web: Web, monkeypatch: Any) -> None:
    """A web server's index that is another by the time it is read is no checkpoint yet, and no error of ours."""
    shards(web.folder / "run", mlp(), 5.0)
    real = Store.head

    def head(self: Store, key: str) -> Stored | None:
        found = real(self, key)
        return replace(found, etag='"before"') if found and key.endswith("index.json") else found

    monkeypatch.setattr(Store, "head", head)
    with Syncer(load_spec(SPEC), f"http://{web.host}/run") as syncer:
        assert syncer.once().status == "empty"


@pytest.mark.parametrize("url", ["run", "run/model.safetensors"])
def test_extras_on_a_web_server_are_found_by_their_names(web: Web, url: str) -> None:
    """A server without lists is asked for each name, and a change of an extra is a new version."""
    file = write(web.folder / "run" / "model.safetensors", mlp(), 1.0)
    os.utime(file, (1e9, 1e9))
    select = Select(settle=0, extras=ExtraFiles(("stats.json", "more/bounds.json")))
    with Syncer(replace(load_spec(SPEC), select=select), f"http://{web.host}/{url}") as syncer:
        outcome = syncer.once()
        assert not outcome.version and "no file matches 'stats.json'" in str(outcome.reason)
        (web.folder / "run" / "more").mkdir()
        (web.folder / "run" / "more" / "bounds.json").write_text("[1]")
        for number in (1, 2):
            extra = web.folder / "run" / "stats.json"
            extra.write_text(f"[{number}]")
            os.utime(extra, (1e9 + number, 1e9 + number))
            os.utime(web.folder / "run" / "more" / "bounds.json", (1e9, 1e9))
            assert [syncer.once().status for _ in range(2)] == ["published", "current"]
            with wsync.lease(NAME) as held:
                assert held.extras == {"stats.json": b"[%d]" % number, "more/bounds.json": b"[1]"}


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_replaced_while_it_is_read_is_thrown_away(web: Web, etags: bool, read_by: Callable[..., None]) -> None:
    """With an ETag or by its time alone: what changed in the middle goes live in none of its states."""
    web.etags = etags
    read_by(chunk=32)
    file = write(web.folder / "x.safetensors", mlp(), 1.0)
    os.utime(file, (1e9, 1e9))
    checkpoint = CheckpointWeightGetter(f"http://{web.host}/x.safetensors").open_newest()
    assert checkpoint
    os.utime(write(file, mlp(), 2.0), (2e9, 2e9))
    layout = layout_of(mlp())
    with checkpoint, pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.read_into(memoryview(bytearray(layout.nbytes)), checkpoint.plan(layout))


def test_a_password_and_a_signature_in_a_url_work_and_are_never_said(
    web: Web, program: Cli, spawn: Spawn, tmp_path: Path
) -> None:
    """What is secret in a URL reaches the server alone: no line, no object, no history and no setting shows it."""
    write(web.folder / "x.safetensors", mlp(), 1.0)
    url = f"http://me:{PASSWORD}@{web.host}/x.safetensors?X-Sig={SIGNATURE}"
    web.password, web.query = f"me:{PASSWORD}", f"X-Sig={SIGNATURE}"
    toml = tmp_path / "p.toml"
    toml.write_text(f'policy = "policies:mlp"\ncheckpoints = "{url}"\n')
    WritableSegment.create("p", layout_of(mlp()), spec=load_spec(str(toml)).fingerprint()).close()
    said = []
    for command in (
        ("push", str(toml), "--json"),
        ("push", str(toml)),
        ("config", str(toml)),
        ("config", str(toml), "--json"),
        ("status", "p", "--json"),
        ("log", "p", "--json"),
        ("inspect", url),
        ("inspect", url, "--json"),
    ):
        done = program(*command)
        assert done.returncode == 0, (command, done.stderr)
        said.append(done.stdout + done.stderr)
    web.password = "me:another"
    web_url = f"http://me:{PASSWORD}@{web.host}"
    for place in (url, f"{web_url}/nothing.safetensors?{SIGNATURE}", url.replace(str(web.port), "1")):
        hasty = spawn("-c", HASTY, "push", SPEC, place, "--json")
        said += hasty.communicate(timeout=DEADLINE)
        assert hasty.returncode == 1
    watch = spawn("-m", "wsync", "watch", str(toml), "--max-failures", "0")
    lines = Lines(watch)
    lines.until("watching", web.host)
    lines.rest()
    said += [*lines.seen, watch.stderr.read() if watch.stderr else ""]
    text = "\n".join(said)
    assert PASSWORD not in text and SIGNATURE not in text
    assert f"http://{web.host}/x.safetensors" in text and "401" in text


def test_errors_of_the_library_hide_what_caused_them(web: Web, monkeypatch: Any) -> None:
    """A traceback of ours shows no error of the store's library, whose text holds the URL whole."""
    import traceback

    monkeypatch.setattr("wsync.stores.store.PATIENCE", replace(PATIENCE, tries=1))
    web.password = "me:another"
    url = f"http://me:{PASSWORD}@{web.host}/x.safetensors?{SIGNATURE}"
    for place in (url, url.replace(str(web.port), "1")):
        with pytest.raises(CheckpointError) as caught:
            CheckpointWeightGetter(place).open_newest()
        text = "".join(traceback.format_exception(caught.value))
        assert PASSWORD not in text and SIGNATURE not in text
        assert PASSWORD not in repr(place_at(place)) and SIGNATURE not in str(place_at(place))
    web.password = f"me:{PASSWORD}"
    gone: Any = place_at(url.replace("?", "?X-Sig=").replace("x.safetensors", "gone"))
    web.query = f"X-Sig={SIGNATURE}"
    with pytest.raises(FileNotFoundError) as missing:
        gone.store.read(Stored("gone", 1, "", 0), 0, 1, print)
    text = "".join(traceback.format_exception(missing.value))
    assert PASSWORD not in text and SIGNATURE not in text


def test_a_file_url_is_a_path(segment: WritableSegment, program: Cli, tmp_path: Path) -> None:
    """file:// is the directory itself, with all that directories have."""
    write(tmp_path / "a run" / "step_1.safetensors", mlp(), 1.0, 1)
    url = f"file://{tmp_path}/a%20run"
    assert place_at(url) == tmp_path / "a run"
    done = program("push", SPEC, url, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["checkpoint"].startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host/run", "'ftp' is not a store"),
        ("s3://", "names no bucket"),
        ("http:///run", "names no host"),
        ("http://user:pa55-in-the-url@[::1/run", "an invalid host"),
        ("http://host/\udcff.safetensors", "names nothing that can be read"),
        ("hf://owner", "names no repository"),
        ("file://elsewhere/run", "another machine"),
        ("s3://key:pa55-in-the-url@bucket/run", "nothing secret"),
        ("gs://bucket/run?sig=pa55-in-the-url", "nothing secret"),
        ("s3://bucket/run/../other", "names nothing that can be read"),
        ("s3://bucket/run//x.safetensors", "names nothing that can be read"),
        ("http://user:pa55-in-the-url@host/a%0Ab", "names nothing that can be read"),
    ],
)
def test_a_url_that_is_none_is_a_usage_error(program: Cli, runtime: Path, url: str, why: str) -> None:
    """A wrong URL is 2, says what to write, and repeats no secret."""
    done = program("push", SPEC, url)
    assert done.returncode == 2 and why in done.stderr, done.stderr
    assert "pa55" not in done.stderr and "Traceback" not in done.stderr


def test_every_store_can_be_opened(monkeypatch: Any) -> None:
    """Each scheme has its client; none talks to anybody before it is asked for something."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    for scheme in {*SCHEMES} - {"hf"}:  # which has one for each commit
        place: Any = place_at(f"{scheme}://where/run")
        assert place.store._client and str(place) == f"{scheme}://where/run"
        place.store.__dict__["_client"] = lambda: "with what no pickle takes, as boto3's session"
        again = pickle.loads(pickle.dumps(place))  # as a spec goes to the process that reads the layout
        assert again == place and again.store._client


def test_without_the_extra_the_message_names_it(runtime: Path) -> None:
    """Where obstore is not installed a URL is a usage error that says what to install."""
    program = (
        "import sys; sys.modules['obstore'] = None; from wsync.cli.commands import main; "
        "sys.argv = ['wsync', 'push', 'policies:mlp', 's3://bucket/run']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2 and "pip install 'wsync[remote]'" in done.stderr, done.stderr


def test_memory_is_a_few_ranges_beside_the_slot(runtime: Path, tmp_path: Path) -> None:
    """While 128 MiB come the process takes no more memory of its own than a few ranges, and writes no file."""
    size = 128 << 20
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    file = raw(tmp_path / "x.safetensors", header)
    os.truncate(file, file.stat().st_size + size)
    toml = tmp_path / "p.toml"
    toml.write_text('policy = "a:b"\nslots = 2\n')
    layout = Layout.build({"w": ("F32", (size // 4,))}, {})
    WritableSegment.create("p", layout, slots=2, spec=load_spec(str(toml)).fingerprint()).close()
    sender = type("One", (Sender,), {"file": str(file)})
    with Server(("127.0.0.1", 0), sender) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.safetensors"
        program = [sys.executable, "-c", PEAK, str(toml), url]
        done = subprocess.run(program, stdout=subprocess.PIPE, timeout=DEADLINE, check=True, cwd=tmp_path)
        server.shutdown()
    before, most = json.loads(done.stdout)
    assert most - before < 64 << 10, "KiB"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.toml", "x.safetensors"]


def test_a_push_from_disk_imports_nothing_of_it(runtime: Path, tmp_path: Path) -> None:
    """Who uses no URL pays nothing for them."""
    write(tmp_path / "x.safetensors", mlp(), 1.0)
    WritableSegment.create("policies.mlp", layout_of(mlp()), spec=load_spec("policies:mlp").fingerprint()).close()
    program = (
        "import sys; from wsync.settings.spec import load_spec; from wsync.sync.syncer import Syncer; "
        f"s = Syncer(load_spec('policies:mlp'), {str(tmp_path)!r}); s.once(); assert s.once().status == 'current'; "
        "print([m for m in sys.modules if m in ('wsync.checkpoints.files.store_objects', 'wsync.stores.path', "
        "'wsync.stores.store', 'obstore', 'concurrent.futures', 'boto3')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
