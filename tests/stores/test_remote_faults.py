"""Networks and stores that fail in the middle: what is live stays, nothing torn goes live, nothing secret is said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any, Literal

import pytest
from builders import marks
from faulty_proxy import Answer, busy, cut, longer, nothing, shifted, truncated
from object_stores import SECRET, Bucket
from policies import mlp
from processes import DEADLINE, Cli

import wsync
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import CheckpointChanged, CheckpointError, CheckpointMismatch
from wsync.history.state import State
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.stores.store import PATIENCE, Store
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

SPEC, NAME, RUN = "policies:mlp", "policies.mlp", "s3://bucket/run"
FAULTS = {"cut": cut, "nothing": nothing, "503": busy, "truncated": truncated, "shifted": shifted, "longer": longer}
RANGE = r"GET \S*step_2\.safetensors"


@pytest.fixture
def live(
    bucket: Bucket, layouts_here: None, monkeypatch: pytest.MonkeyPatch, read_by: Callable[..., None]
) -> Iterator[Syncer]:
    """A syncer with little patience; version 1 is live, with mark 1, and a newer checkpoint of many ranges is there."""
    monkeypatch.setattr("wsync.stores.store.PATIENCE", replace(PATIENCE, tries=4, pause=0.01, quiet=0.5, connect=2.0))
    read_by(chunk=64)
    spec = load_spec(SPEC)
    WritableSegment.create(NAME, layout_of(mlp()), spec=spec.fingerprint()).close()
    with Syncer(spec, RUN) as syncer:
        bucket.save("run/step_1.safetensors", mlp(), 1.0, 1)
        assert syncer.once().status == "published"
        bucket.save("run/step_2.safetensors", mlp(), 2.0, 2)
        yield syncer


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, mode="copy"):
        return marks(policy)


def harmless(outcome: Outcome) -> str:
    """Why a pass did not publish, without anything secret in it."""
    assert outcome.reason and SECRET not in outcome.reason and "127.0.0.1" not in outcome.reason
    assert "\n" not in outcome.reason and len(outcome.reason) < 400
    return outcome.reason


@pytest.mark.parametrize("answer", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_fault_that_passes_is_gone_over(bucket: Bucket, live: Syncer, answer: Answer, times: int) -> None:
    """A range that fails is asked for again; the version is whole."""
    fault = bucket.proxy.arm(RANGE, answer, times=times)
    outcome = live.once()
    assert (outcome.status, outcome.version) == ("published", 2), outcome.reason
    assert fault.happened.wait(DEADLINE) and live_marks() == {2.0}


@pytest.mark.parametrize("answer", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_stays_leaves_what_is_live(bucket: Bucket, live: Syncer, answer: Answer) -> None:
    """A range that always fails ends the pass after a bounded number of tries; the next pass starts anew."""
    bucket.proxy.arm(RANGE)  # the header's
    fault = bucket.proxy.arm(RANGE + r"[\s\S]*bytes=(?!0-)", answer, times=1000)
    before = len(bucket.proxy.heads(RANGE))
    outcome = live.once()
    assert (outcome.status, outcome.version) == ("failed", 1)
    assert "4 tries" in harmless(outcome) and f"{RUN}/step_2.safetensors" in harmless(outcome)
    assert live_marks() == {1.0}
    assert len(bucket.proxy.heads(RANGE)) - before <= 1 + 4 * 16
    fault.times = 0
    assert live.once().status == "published"
    assert live_marks() == {2.0}


@pytest.mark.parametrize("answer", [busy, nothing], ids=["503", "nothing"])
def test_a_listing_that_fails_leaves_what_is_live(bucket: Bucket, live: Syncer, answer: Answer) -> None:
    """A store that cannot be listed is a failed pass, never an empty directory."""
    fault = bucket.proxy.arm("list-type", answer, times=1000)
    outcome = live.once()
    assert (outcome.status, outcome.version, live_marks()) == ("failed", 1, {1.0})
    assert harmless(outcome).startswith(f"{RUN} cannot be read")
    fault.times = 0
    assert live.once().status == "published"


def test_a_slow_body_is_given_up_and_asked_for_again(bucket: Bucket, live: Syncer) -> None:
    """A connection on which nothing comes for too long is left, and another one gives what is missing."""

    def stalls(answer: bytes, body: bytes) -> Any:
        yield answer
        yield body[:8]
        bucket.proxy.closed.wait(DEADLINE)

    fault = bucket.proxy.arm(RANGE + r"[\s\S]*bytes=(?!0-)", stalls)
    assert live.once().status == "published"
    assert fault.happened.wait(DEADLINE) and live_marks() == {2.0}


def test_what_came_is_not_asked_for_again(bucket: Bucket, live: Syncer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut the range goes on where it ended."""
    monkeypatch.setattr(Store, "piece", 1)
    bucket.proxy.arm(RANGE + r"[\s\S]*bytes=(?!0-)", cut)
    assert live.once().status == "published"
    ranges = [head.lower().partition("range: bytes=")[2].split()[0] for head in bucket.proxy.heads(RANGE)][1:]
    ends = [r.split("-")[1] for r in ranges]
    again = [r for r in ranges if ends.count(r.split("-")[1]) == 2]
    assert len(ranges) == len(set(ranges)) and len(again) == 2


def test_pauses_grow(bucket: Bucket, live: Syncer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause between two tries is twice the last."""
    pauses: list[float] = []
    monkeypatch.setattr("wsync.stores.store.time.sleep", pauses.append)
    monkeypatch.setattr("wsync.stores.store.PATIENCE", replace(PATIENCE, tries=7))
    bucket.proxy.arm("list-type", busy, times=1000)
    assert live.once().status == "failed"
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


def test_overwritten_again_and_again_is_left_to_the_next_pass(bucket: Bucket, live: Syncer) -> None:
    """A pass reads twice at most, and says that it is to be tried later; what stands still goes live."""

    def overwrite(mark: float) -> None:
        etag = md5(bucket.save("run/step_2.safetensors", mlp(), mark, 2)).hexdigest()
        if mark < 4.0:
            matches = rf'(?is)(?=.*if-match: "{etag}")(?=.*bytes=(?!0-))'
            bucket.proxy.arm(matches, before=lambda: overwrite(mark + 1))

    bucket.proxy.arm(RANGE + r"[\s\S]*bytes=(?!0-)", before=lambda: overwrite(3.0))
    outcome = live.once()
    assert (outcome.status, outcome.exit_code, outcome.version) == ("busy", 75, 1)
    assert "changed while it was read" in harmless(outcome) and live_marks() == {1.0}
    assert live.once().status == "published"
    assert live_marks() == {4.0}


@pytest.mark.parametrize("honest", [True, False])
def test_a_store_without_conditions_is_seen_through(bucket: Bucket, live: Syncer, honest: bool) -> None:
    """Where a store heeds no If-Match the ETag of each answer tells; where it lies there, too, the look at the end."""
    import re

    etags: list[bytes] = []

    def blind(answer: bytes, body: bytes) -> list[bytes]:
        found = re.search(rb'(?i)etag: ("\w+")', answer)
        assert found
        etags.append(found[1])
        return [answer if honest else answer.replace(found[1], etags[0]), body]

    def ask(head: bytes) -> tuple[bytes, bytes]:
        return real(re.sub(rb"(?i)\r\nif-match: [^\r]*", b"", head))

    real = bucket.proxy._ask
    bucket.proxy._ask = ask  # type: ignore[method-assign]
    bucket.proxy.arm(RANGE, blind)
    bucket.proxy.arm(
        RANGE, blind, before=lambda: bucket.save("run/step_2.safetensors", mlp(), 3.0, 2) if len(etags) == 1 else None
    )
    bucket.proxy.arm(RANGE, blind, times=1000)
    checkpoint = CheckpointWeightGetter(RUN).open_newest()
    assert checkpoint and checkpoint.step == 2
    layout = layout_of(mlp())
    with checkpoint, pytest.raises(CheckpointChanged):
        checkpoint.read_into(memoryview(bytearray(layout.nbytes)), checkpoint.plan(layout))
    assert bool(bucket.proxy.heads(r"HEAD \S*step_2")) is not honest, "an honest answer tells before the end"


def test_deleted_while_it_is_read_gives_the_one_before(bucket: Bucket, live: Syncer) -> None:
    """A trainer's retention was faster: the pass takes the next newest in its place."""
    bucket.save("run/step_3.safetensors", mlp(), 3.0, 3)
    bucket.proxy.arm(
        r"GET \S*step_3\.safetensors[\s\S]*bytes=(?!0-)", before=lambda: bucket.delete("run/step_3.safetensors")
    )
    outcome = live.once()
    assert (outcome.status, outcome.step, live_marks()) == ("published", 2, {2.0})


def test_an_object_cut_short_is_incomplete(bucket: Bucket, live: Syncer) -> None:
    """An upload that holds half a file is passed over, as on disk."""
    data = bucket.save("half", mlp(), 3.0)
    bucket.put("run/step_3.safetensors", data[: len(data) // 2])
    outcome = live.once()
    assert (outcome.status, outcome.step) == ("published", 2)
    assert [o.status for o in outcome.passed_over] == ["empty"]


@pytest.mark.parametrize("order", ["mtime", "step"])
def test_an_object_cut_short_is_read_once(bucket: Bucket, tmp_path: Path, order: Literal["mtime", "step"]) -> None:
    """Guards what a pass costs among halves of uploads: each pass tells the same, and after the first one only lists.

    Each pass is that of a push of its own; once an object has come whole, it goes live.
    """
    spec = replace(load_spec(SPEC), select=Select(order=order))
    WritableSegment.create(NAME, layout_of(mlp()), spec=spec.fingerprint()).close()

    def push() -> tuple[Outcome, int]:
        before = len(bucket.proxy.requests)
        with Syncer(spec, RUN, state=State(NAME, tmp_path)) as syncer:
            return syncer.once(), len(bucket.proxy.requests) - before

    whole = bucket.save("run/step_1.safetensors", mlp(), 1.0)
    assert push()[0].status == "published"
    for step in range(2, 6):
        bucket.put(f"run/step_{step}.safetensors", whole[: len(whole) // 2])
    (first, number), (second, listings) = push(), push()
    assert (first.status, first.newer) == ("current", "s3://bucket/run/step_5.safetensors")
    assert (second.newer, second.reason) == (first.newer, first.reason) and listings == 1 < number
    bucket.save("run/step_4.safetensors", mlp(), 4.0)
    assert (push()[0].status, live_marks()) == ("published", {4.0})


def test_a_lost_network_leaves_what_is_live(bucket: Bucket, live: Syncer) -> None:
    """A store that is gone altogether is a failed pass; a reader keeps its version, and can still attach."""
    bucket.proxy.close()
    outcome = live.once()
    assert (outcome.status, outcome.exit_code, outcome.version) == ("failed", 1, 1)
    assert "no connection" in harmless(outcome) and live_marks() == {1.0}


def test_a_late_thread_writes_nothing(bucket: Bucket, live: Syncer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass that failed, what a slow connection still brings reaches no slot."""
    held, over = threading.Event(), threading.Event()

    def late() -> None:
        held.set()
        over.wait(DEADLINE)

    bucket.proxy.arm(RANGE)
    bucket.proxy.arm(RANGE, before=late)
    bucket.proxy.arm(RANGE, busy, before=lambda: held.wait(DEADLINE), times=1000)  # all others fail
    monkeypatch.setattr("wsync.stores.store.PATIENCE", replace(PATIENCE, tries=1))
    layout = layout_of(mlp())
    weights = bytearray(layout.nbytes)
    ended = threading.Event()
    fetch = wsync.checkpoints.files.store_objects.Objects._fetch

    def watched(self: Any, *args: Any) -> None:
        try:
            fetch(self, *args)
        except CheckpointError:
            raise  # one of those that fail
        except BaseException:
            ended.set()
            raise
        if over.is_set():
            ended.set()

    monkeypatch.setattr("wsync.checkpoints.files.store_objects.Objects._fetch", watched)
    checkpoint = CheckpointWeightGetter(f"{RUN}/step_2.safetensors").open_newest()
    assert checkpoint
    with checkpoint, pytest.raises(CheckpointError):
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout))
    over.set()
    assert ended.wait(DEADLINE)
    assert weights == bytes(layout.nbytes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "not a url"),
        ("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:99999"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("AWS_SESSION_TOKEN", f"{SECRET}\n"),
    ],
)
def test_settings_of_which_no_request_can_be_made_are_told(
    bucket: Bucket, program: Cli, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Guards against a panic of the library, and its words, where a variable has a blank or a line break in it."""
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    done = program("push", SPEC, RUN)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (name if "URL" in name else "environment") in done.stderr and SECRET not in done.stderr


def test_a_profile_signs_requests(bucket: Bucket, program: Cli, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys in the environment those of ~/.aws/credentials are taken, through boto3."""
    pytest.importorskip("boto3")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = FROMPROFILE\naws_secret_access_key = x\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    bucket.save("run/x.safetensors", mlp(), 1.0)
    assert program("inspect", RUN).returncode == 0
    assert all("FROMPROFILE" in head for head in bucket.proxy.requests)


def test_credentials_that_cannot_be_had_are_told(bucket: Bucket, live: Syncer, monkeypatch: Any) -> None:
    """Where what gives credentials fails itself, the pass fails at once, and its own words are not repeated."""

    class Provider:
        config: Any = {}  # noqa: RUF012  (as obstore's protocol has it)

        def __call__(self) -> Any:
            raise RuntimeError(SECRET)

    monkeypatch.setattr("wsync.stores.client._profile", lambda: {"credential_provider": Provider()})
    before = len(bucket.proxy.requests)
    with Syncer(load_spec(SPEC), RUN) as syncer:
        outcome = syncer.once()
    assert outcome.status == "failed" and "is refused (no valid credentials)" in harmless(outcome)
    assert len(bucket.proxy.requests) == before


def test_a_profile_that_is_not_there_is_told(bucket: Bucket, program: Cli, tmp_path: Any, monkeypatch: Any) -> None:
    """A wrong AWS_PROFILE is a usage error, and no traceback of boto3's."""
    pytest.importorskip("boto3")
    (tmp_path / "credentials").write_text("[lab]\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "another")
    done = program("push", SPEC, RUN)
    assert done.returncode == 2 and "ProfileNotFound" in done.stderr and "Traceback" not in done.stderr


def test_a_mismatch_is_told_by_the_header_alone(bucket: Bucket, live: Syncer) -> None:
    """A checkpoint of another architecture costs its header's range."""
    bucket.save("run/step_3.safetensors", mlp(16), 3.0, 3)
    outcome = live.once()
    assert outcome.passed_over[0].kind == CheckpointMismatch.kind
    assert len(bucket.proxy.heads(r"GET \S*step_3")) == 1
