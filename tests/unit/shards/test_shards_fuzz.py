from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

_ROOT = Path(__file__).parents[3]
_MUTATIONS = int(os.environ.get("TESSERA_FUZZ", "1500"))  # of each of two seeds


def _python(*arguments: str, memory: int | None = None) -> subprocess.CompletedProcess[str]:
    """A child, with `memory` bytes of address space."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory))) if memory else None
    return subprocess.run([sys.executable, *arguments], cwd=_ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)


def test_damaged_files_neither_crash_nor_hang_nor_take_memory() -> None:
    for seed in ("0", "1"):
        done = _python("-m", "tests.unit.shards.fuzz", "--seed", seed, "--mutations", str(_MUTATIONS))
        assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
        verdicts = json.loads(done.stdout.splitlines()[-1])
        assert sum(verdicts.values()) == _MUTATIONS
        assert {"kept", "made", "corrupt", "too-large", "not-an-image"} <= verdicts.keys()


_JUDGE = """
import sys
from pipeline.config.shard import ShardImages
from pipeline.shards.images import check_image
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        print(check_image(file.read(), ShardImages()).reason)
"""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_are_refused_by_their_headers(tmp_path: Path) -> None:
    """A 50,000 x 50,000 PNG, whole and sound, of 0.3 MB; WebPs that say they are as large as WebP can be; in 1.5 GiB of addresses,
    most of which are libraries: as pixels each would take 2.5 GB or more."""
    row = zlib.compressobj(9)
    body = b"".join(row.compress(bytes(6251 * 1000)) for _ in range(50)) + row.flush()
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    assert len(png) < 1 << 20
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\xff\x00" * 2  # 65,536 a side, animated
    lossless = b"VP8L" + struct.pack("<I", 14) + b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(9)  # 16,384 a side
    webps = [b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk for chunk in (extended, lossless)]
    paths = []
    for n, data in enumerate([png, *webps]):
        (tmp_path / str(n)).write_bytes(data)
        paths.append(str(tmp_path / str(n)))
    done = _python("-c", _JUDGE, *paths, memory=3 << 29)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["too-large"] * 3
