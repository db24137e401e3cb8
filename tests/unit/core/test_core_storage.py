from __future__ import annotations

import hashlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adlfs import AzureBlobFileSystem

from pipeline.core import stores
from pipeline.core.errors import CredentialsError, StorageError
from pipeline.core.retry import retrying
from pipeline.core.storage import Storage
from pipeline.core.stores import Head

S3 = tuple[str, Callable[[], str]]


@pytest.fixture
def store(any_store: Storage) -> Storage:
    return any_store


def test_write_read(store: Storage, tmp_path: Path) -> None:
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"two")  # over what was there
    assert store.read("a/b.txt") == b"two"
    assert store.exists("a/b.txt") and store.exists("a") and not store.exists("a/c")
    assert store.head("a/b.txt").size == 3
    assert store.read_range("a/b.txt", 1, 9) == b"wo" and store.read_range("a/b.txt", 7, 9) == b"", "what is there of a range"
    room = bytearray(5)
    with memoryview(room) as view:
        assert store.read_into("a/b.txt", 1, view) == 2 and room[:2] == b"wo" and store.read_into("a/b.txt", 7, view) == 0
        with pytest.raises(FileNotFoundError):
            store.read_into("a/c", 0, view)
    for missing in (store.read, store.head):
        with pytest.raises(FileNotFoundError):
            missing("a/c")
    with pytest.raises(FileNotFoundError):
        store.get("a/c", tmp_path / "none")


def test_names_walk_remove(store: Storage) -> None:
    assert store.names() == [] and list(store.walk()) == []
    for key, size in {"b/c/d": 3, "b/a": 1, "top": 2}.items():
        store.write(key, b"x" * size)
    assert store.names() == ["b", "top"] and store.names("b") == ["a", "c"] and store.names("none") == []
    assert list(store.walk()) == [("b/a", 1), ("b/c/d", 3), ("top", 2)]
    assert list((store / "b").walk()) == [("a", 1), ("c/d", 3)]
    Storage(store.url, store.endpoint).write("later", b"")  # another process's write is seen: nothing is cached
    assert "later" in store.names()
    store.remove("b")
    store.remove("b")
    store.remove("later")
    assert list(store.walk()) == [("top", 2)]
    store.remove()
    assert store.names() == []


def test_s3_is_listed_and_removed_a_page_at_a_time(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE", 3)
    store = Storage(s3[1]() + "/store", s3[0])
    for n in range(8):
        store.write(f"running/{n}/mark", b"")
        store.write(f"running/{n}.json", b"{}")
    store.write("running-not", b"kept")
    assert store.names("running") == sorted(name for n in range(8) for name in (f"{n}", f"{n}.json"))
    store.fs.call_s3("put_object", Bucket=store.path.partition("/")[0], Key="store/running/a folder/")
    store.remove("running")
    assert [path for path, _ in store.walk()] == ["running-not"]


def test_what_s3_does_not_remove_is_told(s3: S3) -> None:
    """It answers 200, with the errors in the body."""
    store = Storage(s3[1]() + "/store", s3[0])
    bucket = store.path.partition("/")[0]
    store.write("a/b", b"")
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    store.fs.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    with pytest.raises(CredentialsError, match=r"storage .*/a: the store refused these credentials, cannot remove"):
        store.remove("a")
    assert store.exists("a/b")


def test_put_get(store: Storage, tmp_path: Path) -> None:
    data = os.urandom(6 << 20)
    (tmp_path / "from").write_bytes(data)
    store.put(tmp_path / "from", "x/file")
    store.get("x/file", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == data and store.names("x") == ["file"]


def test_head(store: Storage) -> None:
    data = os.urandom(100_000)
    store.write("a/b", data)
    told = store.head("a/b")
    assert told == Head(100_000, None if store.is_local else hashlib.md5(data).hexdigest())
    with pytest.raises(FileNotFoundError):
        store.head("a/c")


@pytest.mark.parametrize(("kind", "is_md5"), [("aws:kms", False), ("aws:kms:dsse", False), ("AES256", True)])
def test_an_encrypted_objects_etag_may_be_no_md5(s3: S3, kind: str, is_md5: bool) -> None:
    store = Storage(s3[1]() + "/store", s3[0])
    bucket, key, _ = store.fs.split_path(store._at("x"))
    store.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"abc", ServerSideEncryption=kind)
    assert store.head("x") == Head(3, hashlib.md5(b"abc").hexdigest() if is_md5 else None)


def test_only_its_own_unfinished_uploads_are_aborted(s3: S3) -> None:
    store = Storage(s3[1]() + "/run", s3[0])
    fs, bucket = store.fs, store.path.partition("/")[0]

    def begin(key: str) -> str:
        upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
        return key

    ours = [begin("run/step-5/g1-a/rank-0"), begin("run/step-5/g1-a/rank-1")]
    others = [begin("run/step-5/g2-b/rank-0"), begin("run/step-50/g1-a/rank-0"), begin("another/run/step-5/g1-a/rank-0")]
    store.write("step-5/g1-a/done", b"kept")
    assert store.abort_uploads("step-5/g1-a/") == len(ours)
    assert sorted(u["Key"] for u in fs.list_multipart_uploads(bucket)) == sorted(others)
    assert store.abort_uploads("step-5/g1-a/") == 0 and store.read("step-5/g1-a/done") == b"kept"


@pytest.mark.parametrize("kind", ["file", "gs"])
def test_other_stores_have_no_unfinished_uploads(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    store = Storage(str(tmp_path)) if kind == "file" else Storage("gs://lab/x", request.getfixturevalue("gs")[0])
    assert store.abort_uploads("") == 0


def test_uploads_in_a_bucket_that_is_not_there(s3: S3) -> None:
    with pytest.raises(StorageError, match=r"storage s3://no-such-bucket-here/runs/x: cannot remove"):
        Storage("s3://no-such-bucket-here/runs", s3[0]).abort_uploads("x")


@pytest.mark.parametrize("how", ["create", "write"])
def test_many_writers(store: Storage, how: str) -> None:
    """Of 16 at once, `create` lets exactly one win, and a reader sees one writer's bytes whole."""
    start = threading.Barrier(16)
    mine = [b"%x" % n * 100_000 for n in range(16)]  # no line ends, which the emulator of Google's store takes for its own

    def run(n: int) -> bool | None:
        own = Storage(store.url, store.endpoint)
        start.wait()
        # The tests' S3 server answers some of 16 requests at once with 500, as a real one may.
        return retrying("x/COMMIT", lambda: getattr(own, how)("x/COMMIT", mine[n]))

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(run, range(16)))
    there = store.read("x/COMMIT")
    assert there in mine and store.names("x") == ["COMMIT"]
    if how == "create":
        assert won.count(True) == 1 and there == mine[won.index(True)]
        assert not store.create("x/COMMIT", b"late") and store.read("x/COMMIT") == there


def test_create_that_met_its_own_write(store: Storage) -> None:
    """A client whose reply was lost, of a store or of NFS, asks again and finds its own object."""
    assert store.create("x", b"mine")
    assert store.create("x", b"mine")
    assert not store.create("x", b"other") and store.read("x") == b"mine" and store.names() == ["x"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    store.write("x", b"\0" * 300_000)
    done = threading.Event()

    def write() -> None:
        for n in range(60):
            store.write("x", bytes([n]) * 300_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        data = store.read("x")
        assert len(data) == 300_000 and len(set(data)) == 1
    writer.join()


def test_check_writable(store: Storage) -> None:
    store.check_writable()
    assert store.names() == []


def test_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("runs").url == f"{tmp_path}/runs" == Storage(f"file://{tmp_path}/runs/").url
    s3 = Storage("s3://lab/runs/", "http://x") / "a"
    assert (s3.url, s3.endpoint, s3.is_local, Storage("runs").is_local) == ("s3://lab/runs/a", "http://x", False, True)


def test_picklable(store: Storage) -> None:
    store.write("x", b"1")
    back = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert back.url == store.url and back.read("x") == b"1"


def test_unknown_protocol() -> None:
    with pytest.raises(StorageError, match=r"storage nope://x: cannot use 'nope' URLs"):
        Storage("nope://x").read("y")


# What goes wrong


def test_nobody_answers(free_port: int, s3: S3) -> None:
    store = Storage("s3://lab/runs", f"http://127.0.0.1:{free_port}")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"storage s3://lab/runs.*cannot write.*127\.0\.0\.1"):
        store.check_writable()
    assert time.monotonic() - began < 30


def test_no_such_bucket(s3: S3, tmp_path: Path) -> None:
    store = Storage("s3://no-such-bucket-here/runs", s3[0])
    (tmp_path / "x").write_bytes(b"x")
    for call in (store.check_writable, lambda: store.create("x", b""), lambda: store.put(tmp_path / "x", "x")):
        with pytest.raises(StorageError, match=r"storage s3://no-such-bucket-here/runs.*cannot write.*bucket"):
            call()


@pytest.mark.parametrize("kind", ["gs", "abfs"])
def test_no_such_bucket_in_another_cloud(request: pytest.FixtureRequest, kind: str) -> None:
    server = request.getfixturevalue(kind)
    store = Storage(f"{kind}://no-such-bucket-here/runs", server[0] if server else None)
    with pytest.raises(StorageError, match=rf"storage {kind}://no-such-bucket-here/runs.*cannot write"):
        store.check_writable()


def test_wrong_credentials_in_another_cloud(abfs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", right.replace("AccountKey=", "AccountKey=AAAA"))
    monkeypatch.setattr(AzureBlobFileSystem, "_cache", {})  # of instances that know the right one
    with pytest.raises(CredentialsError, match=r"storage abfs://lab/runs.*refused these credentials, cannot write"):
        Storage("abfs://lab/runs").check_writable()


class CutProxy:
    """A way to `port` that hangs up on a connection after the first `limit` bytes of its requests."""

    def __init__(self, port: int, limit: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self._to, self._limit = self._listener.getsockname()[1], port, limit
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        left = self._limit
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            while left > 0:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(min(65536, left) if ready is client else 65536)
                    if not data:
                        return
                    (server if ready is client else client).sendall(data)
                    left -= len(data) if ready is client else 0
            self.cut += 1


def test_an_upload_cut_off_leaves_nothing(s3: S3, tmp_path: Path) -> None:
    endpoint, make_bucket = s3
    url = make_bucket()
    proxy = CutProxy(int(endpoint.rpartition(":")[2]), 300_000)
    (tmp_path / "x").write_bytes(os.urandom(1 << 20))
    cut, direct = Storage(url, f"http://127.0.0.1:{proxy.port}"), Storage(url, endpoint)
    with pytest.raises(StorageError, match="x: cannot write"):
        cut.put(tmp_path / "x", "x")
    assert proxy.cut >= 1 and list(direct.walk()) == []


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(200_000))
    store = Storage(str(small_disk))
    store.write("small", b"kept")
    for call in (
        lambda: store.put(tmp_path / "x", "big"),
        lambda: store.write("big", bytes(200_000)),
        lambda: store.create("big", bytes(200_000)),
    ):
        with pytest.raises(StorageError, match=r"disk/big: cannot write, the disk is full"):
            call()
    assert store.names() == ["small"]  # no half file, no rest of one


def test_a_read_only_file_system(sealed_disk: Path) -> None:
    with pytest.raises(StorageError, match="cannot write, the file system is read-only"):
        Storage(str(sealed_disk)).check_writable()


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(StorageError, match=r"storage .*/x: cannot write"):
        Storage(str(tmp_path / "x")).check_writable()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="no permission to write"):
        Storage(str(tmp_path)).check_writable()


@pytest.fixture
def strict_s3(free_port: int, s3: S3) -> Iterator[str]:
    """An S3 server that knows nobody, so refuses every key."""
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(free_port)]
    server = subprocess.Popen(
        command, env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "0"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", free_port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{free_port}"
    server.terminate()
    server.wait()


def test_credentials_refused(strict_s3: str) -> None:
    store = Storage("s3://lab/runs", strict_s3)
    for call in (
        store.check_writable,
        lambda: store.create("x", b""),
        lambda: store.read("x"),
        store.names,
        lambda: store.exists("x"),
        lambda: list(store.walk()),
    ):
        with pytest.raises(CredentialsError, match=r"storage s3://lab/runs.*the store refused these credentials, cannot (write|read|list)"):
            call()
