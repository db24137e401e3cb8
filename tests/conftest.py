"""What tests of several rooms share: an S3 server, and small real datasets."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.shards.images import Checked
from pipeline.shards.layout import sample_key
from pipeline.shards.manifest import Manifest, dataset_hash, publish
from pipeline.shards.samples import Sample
from pipeline.shards.writer import write_shard
from tests.clouds import Conditions, azure, google

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tessera", "AWS_SECRET_ACCESS_KEY": "tessera", "AWS_DEFAULT_REGION": "us-east-1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first: none is to be left to one worker at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real Ray on this machine, one for all tests that use Ray in their own process."""
    import ray

    os.environ |= CREDENTIALS  # its workers read and write the S3 server of the tests
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[str, Callable[[], str]]]:
    """(endpoint, a function that makes an empty bucket and gives its `s3://..` URL) of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    os.environ |= CREDENTIALS
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"

    def make_bucket() -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        Storage(f"s3://{name}", endpoint).fs.mkdir(name)
        return f"s3://{name}"

    yield endpoint, make_bucket
    server.stop()


@pytest.fixture(scope="session")
def gs() -> Iterator[tuple[str, Conditions]]:
    """(endpoint, what stands before it) of a Google store on this machine, with the bucket `lab`."""
    os.environ |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "tessera"}
    with google() as found:
        yield found


@pytest.fixture(scope="session")
def abfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An Azure store on this machine, with the container `lab`, as this process's default."""
    with azure(tmp_path_factory.mktemp("azure")) as connection:
        os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection
        Storage("abfs://lab").fs.mkdir("lab")
        yield


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Storage:
    """An empty directory on each kind of store."""
    return _open_store(request, request.param)


@pytest.fixture(params=["file", "s3", "gs", "abfs"])
def any_store(request: pytest.FixtureRequest) -> Storage:
    """The same with the stores of the other two clouds among them."""
    return _open_store(request, request.param)


def _open_store(request: pytest.FixtureRequest, kind: str) -> Storage:
    if kind == "file":
        return Storage(str(request.getfixturevalue("tmp_path") / "store"))
    if kind == "s3":
        endpoint, make_bucket = request.getfixturevalue("s3")
        return Storage(make_bucket() + "/store", endpoint)
    server = request.getfixturevalue(kind)
    return Storage(f"{kind}://lab/{uuid.uuid4().hex}", server[0] if server else None)


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _picture(number: int, width: int, height: int, label: int, classes: int) -> bytes:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 160, (height, width, 3))
    pixels[..., label % 3] += 80 * (label + 1) // classes
    png = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(png, "PNG")
    return png.getvalue()


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Manifest]:
    """Write a dataset of noisy PNGs, without Ray: `make_dataset(directory, {"train": 50, "test": 12})`."""

    def make(
        directory: Storage,
        splits: dict[str, int],
        *,
        width: int = 8,
        height: int = 8,
        classes: int = 3,
        per_shard: int = 20,
        unlabelled: int = 0,
    ) -> Manifest:
        """Every `unlabelled`th sample has no label."""
        written = []
        for split, count in splits.items():
            for shard, first in enumerate(range(0, count, per_shard)):
                samples = []
                for n in range(first, min(first + per_shard, count)):
                    label = -1 if unlabelled and n % unlabelled == 0 else n % classes
                    image = Checked(_picture(n, width, height, n % classes, classes), "png", width, height)
                    samples.append(Sample(sample_key(f"{split}/{n}"), image, label, f"{split} {n}".encode(), b'{"n": %d}' % n))
                written.append(write_shard(directory, f"{split}-{shard:05d}.tar", split, samples))
        records = [w.record for w in written if w is not None]
        manifest = Manifest(
            hash=dataset_hash(records), config="none", source="made", classes=[str(c) for c in range(classes)], splits=splits,
            bytes=sum(r.bytes for r in records), read=sum(splits.values()), written=sum(splits.values()), ignored=0, dropped={}, dropped_samples=[],
            smallest=(width, height),
        )  # fmt: skip
        publish(directory, records, manifest)
        return manifest

    return make


def _mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    done = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
        if os.getuid() == 0
        else None
    )
    if done is None or done.returncode:
        pytest.skip(f"mounting is not permitted here ({done.stderr.strip() if done else 'not root'})")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Has room for 64 KiB."""
    yield from _mounted(tmp_path / "disk", "size=64k")


@pytest.fixture
def sealed_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _mounted(tmp_path / "disk", "ro,size=64k")
