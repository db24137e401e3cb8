"""Stores of the other two clouds, as servers of their own on this machine: Google's and Azure's."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from tests.faults import FaultyStore, faulty_store
from tests.integration.services import free_ports, service

AZURITE = "azurite-blob"
_ACCOUNT, _KEY = "tessera", base64.b64encode(b"tessera" * 9).decode()


class Conditions(FaultyStore):
    """In front of an emulator of Google's store, which ignores conditions: holds uploads to `ifGenerationMatch=0`, as Google does."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.is_kept = True
        self.turn = threading.Lock()  # nothing may come between the question whether an object is there and its upload

    def judge(self, method: str, target: str, body: bytes) -> str | None:
        url = urlsplit(target)
        if self.is_kept and method == "POST" and parse_qs(url.query).get("ifGenerationMatch") == ["0"]:
            about, _ = json.JSONDecoder().raw_decode(body[body.index(b"{") :].decode("latin-1"))  # the first part; the second is the object
            return "exists" if self._is_there(url.path, about["name"]) else None
        return None

    def _is_there(self, path: str, name: str) -> bool:
        bucket = path.partition("/b/")[2].partition("/")[0]
        to = http.client.HTTPConnection(self.target)
        to.request("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        status = to.getresponse().status
        to.close()
        return status == 200


@contextmanager
def google() -> Iterator[tuple[str, Conditions]]:
    """(endpoint, what stands before it) of a store that speaks Google's protocol; it has the bucket `lab`."""
    from gcp_storage_emulator.server import create_server

    [port] = free_ports(1)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="lab")
    server.start()
    try:
        with faulty_store(f"http://127.0.0.1:{port}", kind=Conditions) as (endpoint, store):
            assert isinstance(store, Conditions), "as asked for"
            yield endpoint, store
    finally:
        server.stop()


@contextmanager
def azure(folder: Path) -> Iterator[str]:
    """The connection string of a store that speaks Azure's protocol; it has the container `lab`. Skips where there is no emulator."""
    program = shutil.which(AZURITE)
    if program is None:
        pytest.skip(f"{AZURITE} is not installed (npm install --global azurite)")
    [port] = free_ports(1)
    command = [program, "--silent", "--skipApiVersionCheck", "--blobPort", str(port), "--location", str(folder)]
    account = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT};"
    with service(command, folder / "log", lambda: _listens(port), {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_KEY}"}):
        yield f"DefaultEndpointsProtocol=http;{account}"


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
