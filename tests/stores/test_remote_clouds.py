"""What differs between stores, in each: s3:// and gs:// by moto's server, which speaks one XML, az:// by Azurite."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, marks
from faulty_proxy import Proxy, cut
from object_stores import SECRET, Bucket
from policies import mlp
from processes import DEADLINE, Cli, Lines

import wsync
from wsync.discovery.newest import Select
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

ACCOUNT = "devstoreaccount1"
KEY = (  # Azurite's own, which its documentation tells
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
Save = Callable[..., bytes]


class Cloud:
    """A bucket of a store behind a proxy.

    Attributes:
        run: URL of the place of checkpoints in it.
        save: puts a policy's checkpoint there, as ``Bucket.save``.
        key: the variable that holds what is secret, and a wrong value for it.
    """

    def __init__(self, run: str, proxy: Proxy, save: Save, key: tuple[str, str]) -> None:
        self.run, self.proxy, self.save, self.key = run, proxy, save, key


@pytest.fixture(scope="session")
def azurite() -> Iterator[int]:
    """The port of an Azurite that lives as long as the tests of this worker."""
    program = shutil.which("azurite-blob")
    if not program:
        pytest.skip("Azurite is not installed (npm install azurite)")
    options = "--blobHost 127.0.0.1 --blobPort 0 --inMemoryPersistence --skipApiVersionCheck --disableTelemetry"
    with subprocess.Popen(
        [program, *options.split(), "--silent"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            line = Lines(server).until("successfully listens on")
            yield int(line.rpartition(":")[2])
        finally:
            server.kill()


def make_container(port: int, name: str) -> None:
    """Makes it anew, by requests signed as Azure's shared keys are."""
    for method, status in (("DELETE", (202, 404)), ("PUT", (201,))):
        date = formatdate(usegmt=True)
        signed = "\n".join(
            [
                *(method, *[""] * 11, f"x-ms-date:{date}", "x-ms-version:2021-08-06"),
                *(f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"),
            ]
        )
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        connection.request(method, f"/{ACCOUNT}/{name}?restype=container", headers=headers)
        assert connection.getresponse().status in status
        connection.close()


@pytest.fixture(params=["s3", "gs", "az"])
def cloud(request: pytest.FixtureRequest, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An empty bucket of each kind, an environment in which wsync finds it, and a segment of the policy."""
    WritableSegment.create(NAME, layout_of(mlp()), spec=load_spec(SPEC).fingerprint()).close()
    bucket: Bucket
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        yield Cloud("s3://bucket/run", bucket.proxy, bucket.save, ("AWS_SECRET_ACCESS_KEY", "wr0ng"))
        return
    if request.param == "gs":
        bucket = request.getfixturevalue("bucket")
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("GOOGLE_BASE_URL", bucket.proxy.url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", SECRET)
        yield Cloud("gs://bucket/run", bucket.proxy, bucket.save, ("GOOGLE_BEARER_TOKEN", "wr0ng"))
        return
    port: int = request.getfixturevalue("azurite")
    from obstore.store import AzureStore

    make_container(port, "bucket")
    put = AzureStore(
        "bucket",
        account_name=ACCOUNT,
        account_key=KEY,
        endpoint=f"http://127.0.0.1:{port}/{ACCOUNT}",
        client_options={"allow_http": True},
    )
    proxy = Proxy(port)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.url}/{ACCOUNT}")
    bucket = Bucket.of(put, proxy)
    yield Cloud("az://bucket/run", proxy, bucket.save, ("AZURE_STORAGE_ACCOUNT_KEY", "d3IwbmcK"))
    proxy.close()


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, mode="copy"):
        return marks(policy)


def test_the_newest_goes_live(cloud: Cloud) -> None:
    """What is newest is published; to find nothing new is one request; what was replaced under its name is new."""
    cloud.save("run/step_9.safetensors", mlp(), 9.0, 9)
    cloud.save("run/größe 10%20.safetensors", mlp(), 10.0, 10)
    with Syncer(replace(load_spec(SPEC), select=Select(order="step")), cloud.run) as syncer:
        outcome = syncer.once()
        assert (outcome.status, outcome.step) == ("published", 10), outcome.reason
        before = len(cloud.proxy.requests)
        assert syncer.once().status == "current"
        assert len(cloud.proxy.requests) - before == 1
        cloud.save("run/größe 10%20.safetensors", mlp(), 11.0, 11)
        assert syncer.once().status == "published"
    assert live_marks() == {11.0}
    with Syncer(load_spec(SPEC), f"{cloud.run}/größe 10%20.safetensors") as syncer:
        assert syncer.once().status == "current", "by its own name it is the same version as from a listing"


def test_every_range_is_of_the_listed_version(cloud: Cloud) -> None:
    """Header and ranges carry the version of the listing as If-Match."""
    cloud.save("run/x.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), cloud.run) as syncer:
        assert syncer.once().status == "published"
    gets = [head.lower() for head in cloud.proxy.heads(r"GET \S*x(\.|%2E)safetensors")]
    assert len(gets) == 2
    assert all('\r\nif-match: "' in head and re.search(r"range: bytes=\d", head) for head in gets)


def test_overwritten_while_it_is_read_is_read_again(cloud: Cloud, read_by: Callable[..., None]) -> None:
    """Of an object that is overwritten in the middle nothing goes live; what took its place does."""
    read_by(chunk=64)
    cloud.save("run/x.safetensors", mlp(), 1.0)
    fault = cloud.proxy.arm(
        r"GET \S*safetensors[\s\S]*bytes=(?!0-)", before=lambda: cloud.save("run/x.safetensors", mlp(), 2.0)
    )
    with Syncer(load_spec(SPEC), cloud.run) as syncer:
        assert syncer.once().status == "published"
    assert fault.happened.is_set() and live_marks() == {2.0}


def test_a_cut_is_gone_over(cloud: Cloud, monkeypatch: Any) -> None:
    """A connection that is cut in the middle of a body is made again, from where it was cut."""
    cloud.save("run/x.safetensors", mlp(), 1.0)
    fault = cloud.proxy.arm(r"GET \S*safetensors[\s\S]*bytes=(?!0-)", cut)
    with Syncer(load_spec(SPEC), cloud.run) as syncer:
        assert syncer.once().status == "published"
    assert fault.happened.is_set() and live_marks() == {1.0}


def test_a_bucket_that_is_not_there_is_told(cloud: Cloud, program: Cli) -> None:
    """A wrong bucket is a failure with the store's own word for it, and no empty place."""
    done = program("push", SPEC, cloud.run.replace("bucket", "another"))
    assert done.returncode == 1 and "404" in done.stderr and "another" in done.stderr, done.stderr
    assert len(cloud.proxy.requests) == 1 and (cloud.run.startswith("az") or "NoSuchBucket" in done.stderr)
    assert SECRET not in done.stderr and "Traceback" not in done.stderr


def test_refused_credentials_are_told_without_them(cloud: Cloud, program: Cli, monkeypatch: Any) -> None:
    """403 is told at once, with what to do, and without the key, wherever it is told again."""
    denied = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    variable, wrong = cloud.key
    monkeypatch.setenv(variable, wrong)

    def refuse(answer: bytes, body: bytes) -> list[bytes]:
        return [b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(denied), denied]

    if not cloud.run.startswith("az"):  # moto takes any
        cloud.proxy.arm(".", refuse, times=10)
    done = program("push", SPEC, cloud.run, "--json")
    assert done.returncode == 1 and "403 Forbidden, A" in done.stdout and "credentials" in done.stdout
    assert len(cloud.proxy.requests) == 1
    told = done.stdout + done.stderr + program("status", "--json").stdout + program("log", NAME, "--json").stdout
    assert wrong not in told and "Traceback" not in told


def test_azure_without_an_account_is_told(program: Cli, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """az:// names a container alone, and a user who did not say of which account is told so."""
    pytest.importorskip("obstore")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    done = program("push", SPEC, "az://bucket/run")
    assert done.returncode == 2 and "AZURE_STORAGE_ACCOUNT_NAME" in done.stderr
