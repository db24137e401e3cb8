"""Uploads from a process of their own: what is there afterwards is what was sent, and nobody is left behind."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipeline.core import stores
from pipeline.core.errors import StorageError
from pipeline.core.storage import Storage
from pipeline.core.upload import Uploader
from tests.faults import FaultyStore, faulty_store

S3 = tuple[str, Callable[[], str]]
MIB = 1 << 20


@contextmanager
def uploading(directory: Storage, data: bytes, patience: float = 30.0) -> Iterator[tuple[Uploader, list[str]]]:
    """An uploader of `data`, and the warnings that it gave."""
    warnings: list[str] = []
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        uploader = Uploader(directory, file.fileno(), len(data), patience, warnings.append)
        try:
            yield uploader, warnings
        finally:
            uploader.close()


@pytest.fixture
def watched(s3: S3) -> Iterator[tuple[Storage, Storage, FaultyStore]]:
    """The same empty directory straight and by way of a proxy, and the proxy."""
    endpoint, make_bucket = s3
    url = make_bucket() + "/x"
    with faulty_store(endpoint) as (proxy, store):
        yield Storage(url, endpoint), Storage(url, proxy), store


def once(store: FaultyStore, method: str, ending: str, act: Callable[[], None]) -> None:
    """`act` just before the first such request is served."""
    acts = iter([act])

    def plan(asked: str, path: str) -> None:
        if asked == method and path.endswith(ending) and (first := next(acts, None)):
            first()

    store.plan = plan


def test_receipts_tell_what_is_there(any_store: Storage) -> None:
    data = os.urandom(3 * MIB)
    with uploading(any_store, data) as (uploader, warnings):
        receipt, blocks = uploader.upload("a/large", MIB)
        small = uploader.write({"a/one": b"1", "a/none": b""})
    assert any_store.read("a/large") == data and any_store.read("a/none") == b"" and not warnings
    assert (receipt.bytes, receipt.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert blocks == [hashlib.sha256(data[at : at + MIB]).hexdigest() for at in range(0, len(data), MIB)]
    assert [(r.name, r.bytes, r.sha256) for r in small] == [
        ("a/one", 1, hashlib.sha256(b"1").hexdigest()),
        ("a/none", 0, hashlib.sha256(b"").hexdigest()),
    ]


# Its owner


@pytest.mark.parametrize("line", [b"", b'{"key": "a", "blo', b'{"objects": {"a": "not base64!"}', b"\xff\xfe"])
def test_it_dies_with_its_owner_in_the_middle_of_a_request(tmp_path: os.PathLike[str], line: bytes) -> None:
    with uploading(Storage(str(tmp_path)), b"x" * 1000) as (uploader, _):
        process = uploader._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        process.stdin.close()  # what a kill -9 of its owner does
        assert process.wait(timeout=20) == 0 and process.stdout.read() == b""


# What is there


@pytest.mark.parametrize("which", ["large", "small"])
@pytest.mark.parametrize("harm", ["gone", "cut", "changed"])
def test_what_is_not_there_as_it_was_sent_is_sent_again(watched: tuple[Storage, Storage, FaultyStore], which: str, harm: str) -> None:
    direct, directory, store = watched
    data = os.urandom(2 * MIB)

    def act() -> None:
        if harm == "gone":
            direct.remove(which)
        else:
            direct.write(which, data[:-1] + (b"" if harm == "cut" else bytes([data[-1] ^ 1])))

    once(store, "HEAD", which, act)
    with uploading(directory, data) as (uploader, warnings):
        receipts = [uploader.upload("large", MIB)[0]] if which == "large" else uploader.write({"small": data})
    assert direct.read(which) == data and receipts[0].sha256 == hashlib.sha256(data).hexdigest()
    sentence = {
        "gone": "it was uploaded, and is not there",
        "cut": f"{2 * MIB} bytes were uploaded, and {2 * MIB - 1} are there",
        "changed": "what is there differs from what was uploaded, from byte 0 on",
    }[harm]
    assert warnings == [f"storage {directory.url}/{which}: {sentence}; trying again"]


def test_what_never_is_there_is_an_error(watched: tuple[Storage, Storage, FaultyStore]) -> None:
    direct, directory, store = watched
    store.plan = lambda method, path: direct.remove("a") if method == "HEAD" else None
    with uploading(directory, b"x" * 1000, patience=1.0) as (uploader, _):
        with pytest.raises(StorageError, match=r"/a: it was uploaded, and is not there"):
            uploader.upload("a", 100)
        store.plan = lambda method, path: None
        assert uploader.upload("a", 100)[0].bytes == 1000, "the process is there still"


def test_a_checksum_that_is_none_of_the_content_costs_one_look(watched: tuple[Storage, Storage, FaultyStore]) -> None:
    """As of a store that encrypts and does not say so; here, the same content in one part of an upload in parts."""
    direct, directory, store = watched
    data, asked = os.urandom(MIB), list[str]()

    def plan(method: str, path: str) -> None:
        asked.append(method)
        if method == "HEAD":
            fs, (bucket, key, _) = direct.fs, direct.fs.split_path(direct._at("a"))
            upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
            part = fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=data)["ETag"]
            parts = {"Parts": [{"PartNumber": 1, "ETag": part}]}
            fs.call_s3("complete_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts)

    store.plan = plan
    with uploading(directory, data) as (uploader, warnings):
        uploader.upload("a", MIB)
        assert asked.count("GET") == 1, "it was read back"
        uploader.upload("a", MIB)
        assert asked.count("GET") == 1 and asked.count("HEAD") == 2 and not warnings


def test_an_upload_in_parts_is_compared_too(watched: tuple[Storage, Storage, FaultyStore]) -> None:
    direct, directory, store = watched
    data = os.urandom(MIB) * 120
    asked: list[str] = []
    store.plan = lambda method, path: asked.append(method)
    with uploading(directory, data) as (uploader, warnings):
        uploader.upload("a", 8 * MIB)
    there = direct.head("a").md5
    assert there is not None and there.endswith("-3") and asked.count("PUT") == 3 and "GET" not in asked and not warnings
    assert there == stores.md5(lambda start, stop: data[start:stop], len(data), "s3")
    assert there != stores.md5(lambda start, stop: (data[:-1] + b"?")[start:stop], len(data), "s3")


def test_an_answer_that_was_lost_is_no_lost_upload(watched: tuple[Storage, Storage, FaultyStore]) -> None:
    """The parts are put together, and nobody hears of it; asked again, the store knows no such upload."""
    _, directory, store = watched
    data, asked = os.urandom(MIB) * 120, list[str]()

    def plan(method: str, path: str) -> str | None:
        asked.append(method)
        return "cut" if method == "POST" and asked.count("POST") == 2 else None

    store.plan = plan
    with uploading(directory, data) as (uploader, warnings):
        receipt, _ = uploader.upload("a", 8 * MIB)
    assert store.seen["cut"] == 1 and asked.count("PUT") == 3, "nothing is sent twice"
    assert receipt.bytes == len(data) and not warnings
