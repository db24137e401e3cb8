"""Images of evaluation sets in a collection: what is denied because of which, and the audit of each set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.config.shard import Contamination, Shard
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards import __main__ as command
from pipeline.shards.denied import Denied, list_denied
from pipeline.shards.duplicates import contamination
from pipeline.shards.duplicates.contamination import find_contamination
from pipeline.shards.duplicates.stage import check_sets, treat_copies
from pipeline.stream import open_dataset
from tests.unit.shards.copies import CHANGES, denied, key_of, views, write_hashes, write_pictures
from tests.unit.stream.photographs import encoded

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Storage]:
    """Ours: pictures 0 to 7, and changed ones of 8 and 9. A benchmark with 0 and 8, one of them in its train split, without hashes; and
    one with 10 and 11."""
    whole = [encoded(picture, "JPEG", quality=95) for picture in views()]
    where = {name: Storage(str(tmp_path / name)) for name in ("ours", "bench", "other")}
    train = [(f"ours/{n}", whole[n]) for n in range(8)] + [(f"{name} of 8", change(views()[8])) for name, change in CHANGES.items()]
    write_pictures(where["ours"], {"train": train, "test": [("smaller 9", CHANGES["smaller"](views()[9]))]})
    bench = {"val": [("bench/8", whole[8]), ("bench/10", whole[10])], "train": [("bench/0", whole[0]), ("bench/9", whole[9])]}
    write_pictures(where["bench"], bench, hashed=False)
    write_pictures(where["other"], {"test": [("other/10", whole[10]), ("other/11", whole[11])]})
    return where


def test_the_audit_and_the_list(places: dict[str, Storage]) -> None:
    ours, bench, other = places["ours"], places["bench"], places["other"]
    files = {name: bench.read(name) for name in bench.names()}
    sets = [
        Contamination(url=bench.url, near=4),
        Contamination(url=other.url, near=4),
        Contamination(url=bench.url, split="train", near=None),
    ]
    found = find_contamination(ours, sets, 2, images=5)
    audits = found["sets"]
    assert json.loads(ours.read("contamination.json")) == found
    assert [(a["url"], a["split"], a["near"]) for a in audits] == [(bench.url, None, 4), (other.url, None, 4), (bench.url, "train", None)]
    assert audits[0]["images"] == {
        "train": {"images": 2, "exact": 1, "near": 1},
        "val": {"images": 2, "exact": 0, "near": 1},
    }
    assert audits[0]["denied"] == {"test": {"exact": 0, "near": 1}, "train": {"exact": 1, "near": len(CHANGES)}}
    assert audits[1]["images"] == {"test": {"images": 2, "exact": 0, "near": 0}}
    assert audits[1]["denied"] == {split: {"exact": 0, "near": 0} for split in ("test", "train")}
    assert audits[2]["images"] == {"train": {"images": 2, "exact": 1, "near": 0}}
    rows = denied(ours, "contamination")
    want = [("ours/0", "bench/0", True)] * 2 + [("smaller 9", "bench/9", False)] + [(f"{name} of 8", "bench/8", False) for name in CHANGES]
    assert sorted((r["key"], r["of_key"], r["exact"]) for r in rows) == sorted((key_of(a), key_of(b), e) for a, b, e in want)
    # The first of ours is in two sets: each counts it, the list once.
    assert audits[2]["denied"]["train"] == {"exact": 1, "near": 0} and found["denied"] == audits[0]["denied"]
    assert list_denied(ours, 1)[0] == [Denied("contamination", len(want) - 1, 1, 1 + len(CHANGES))]
    assert {r["of"] for r in rows} == {bench.url} and all(r["distance"] <= 4 for r in rows)  # type: ignore[operator]
    assert [r["key"] for r in rows] == sorted(str(r["key"]) for r in rows)
    assert len(open_dataset(ours.url)) == 7 and files == {name: bench.read(name) for name in bench.names()}
    with pytest.raises(DataError, match="leave none of its 1 samples"):
        open_dataset(ours.url, "test")


def test_however_the_work_is_cut(places: dict[str, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets too large for one task, few of ours in each: the same bytes."""
    ours, sets = places["ours"], [Contamination(url=places["bench"].url, near=4)]
    find_contamination(ours, sets, 1)
    first = ours.read("deny/contamination.parquet"), ours.read("contamination.json")
    ours.remove("contamination.json")
    monkeypatch.setattr(contamination, "TABLE", 1)
    find_contamination(ours, sets, 2, images=1)
    assert (ours.read("deny/contamination.parquet"), ours.read("contamination.json")) == first


def test_it_is_what_comparing_all_gives(tmp_path: Path) -> None:
    random, near = np.random.default_rng(3), 3
    ours, theirs = Storage(str(tmp_path / "ours")), Storage(str(tmp_path / "theirs"))
    made = {}
    for where, count in ((ours, 600), (theirs, 90)):
        keys = [f"{where.path[-6:]}{n:04d}" for n in range(count)]
        made[where] = keys, random.integers(0, 256, (count, 32), dtype=np.uint8), random.integers(0, 2**64 - 1, count, dtype=np.uint64)
    for a, b in random.integers(0, 90, (120, 2)):
        flips = random.choice(64, random.integers(0, 6), replace=False)
        made[ours][2][a * 6] = made[theirs][2][b] ^ np.uint64(sum(1 << int(bit) for bit in flips))
        if a % 5 == 0:
            made[ours][1][a * 6 + 1], made[ours][2][a * 6 + 1] = made[theirs][1][b], made[theirs][2][b]
        if b % 7 == 0:
            made[theirs][2][b - 1] = made[theirs][2][b]
    has = {where: values[1][:, 0] > 40 for where, values in made.items()}
    write_hashes(ours, {"train": 600}, *made[ours], has[ours], per_shard=50)
    write_hashes(theirs, {"test": 90}, *made[theirs], has[theirs], per_shard=40)
    [audit] = find_contamination(ours, [Contamination(url=theirs.url, near=near)], 2, images=100)["sets"]
    want, met = {}, {"exact": set[int](), "near": set[int]()}
    for n, key in enumerate(made[ours][0]):
        found = []
        for m in range(90):
            distance = (int(made[ours][2][n]) ^ int(made[theirs][2][m])).bit_count()
            if bytes(made[ours][1][n]) == bytes(made[theirs][1][m]):
                found.append((False, 0, m))
                met["exact"].add(m)
            elif has[ours][n] and has[theirs][m] and distance <= near:
                found.append((True, distance, m))
                met["near"].add(m)
        if found:
            is_near, distance, m = min(found)
            want[key] = made[theirs][0][m], distance, not is_near
    rows = denied(ours, "contamination")
    assert {r["key"]: (r["of_key"], r["distance"], r["exact"]) for r in rows} == want and len(rows) == len(want) > 20
    assert audit["images"]["test"] == {"images": 90, "exact": len(met["exact"]), "near": len(met["near"] - met["exact"])}
    assert audit["denied"]["train"] == {"exact": sum(v[2] for v in want.values()), "near": sum(not v[2] for v in want.values())}


def test_the_stage(places: dict[str, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [{"url": places["bench"].url, "near": 4}, {"url": places["bench"].url, "split": "train", "near": None}]
    shard = Shard.model_validate({"source": {"url": "x"}, "images": {"hash": True}, "contamination": sets, "workers": 2})
    want = {"shard/contamination/exact": 1, "shard/contamination/near": 1 + len(CHANGES)}
    assert treat_copies(places["ours"], shard) == want
    monkeypatch.setattr(contamination, "_compare", lambda *args: pytest.fail("looked for again"))
    assert treat_copies(places["ours"], shard) == want
    check_sets(shard.contamination)
    with pytest.raises(ConfigError, match=r"shard.contamination.0.split: 'tst' is no split of .*bench \(allowed: train, val\)"):
        check_sets([Contamination(url=places["bench"].url, split="tst")])
    with pytest.raises(ConfigError, match=r"shard.contamination.0.url: there is no dataset at .*none"):
        check_sets([Contamination(url=f"{places['bench'].url}/none")])


def test_the_command(places: dict[str, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "connect_ray", lambda local: None)  # it is
    urls = [places[name].url for name in ("ours", "bench", "other")]
    done = CliRunner().invoke(command.main, ["contamination", *urls, "--near", "4"])
    assert done.exit_code == 0, done.output
    assert (
        "val: of 2 images 0 are here too, and 1 nearly" in done.output
        and f"denied of train: 1 equal files, {len(CHANGES)} near" in done.output
    )
    wrong = CliRunner().invoke(command.main, ["contamination", *urls, "--split", "nope"])
    assert wrong.exit_code == 3 and "'nope' is no split of" in wrong.output


def test_a_set_on_a_store(places: dict[str, Storage], s3: tuple[str, object]) -> None:
    """Ours and theirs on S3."""
    endpoint, make_bucket = s3
    url = make_bucket()  # type: ignore[operator]
    moved = {}
    for name in ("ours", "bench"):
        moved[name] = Storage(f"{url}/{name}", endpoint)
        for file in places[name].names():
            moved[name].write(file, places[name].read(file))
    [audit] = find_contamination(moved["ours"], [Contamination(url=moved["bench"].url, near=4)], 2)["sets"]
    assert audit["denied"]["train"] == {"exact": 1, "near": len(CHANGES)}
    assert len(open_dataset(moved["ours"].url, endpoint=endpoint)) == 7
