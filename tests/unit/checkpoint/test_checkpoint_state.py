"""State as fragments: how it lies in a file, how it is saved in the background, how any other cut of it reads it again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from pipeline.checkpoint import Checkpoints, Commit
from pipeline.checkpoint.fragments import BLOCK, Fragment, Index, lay_out, own_share
from pipeline.checkpoint.memory import HostMemory, free_memory
from pipeline.checkpoint.read import newest_sound, read_into, verify
from pipeline.checkpoint.retain import Retention
from pipeline.checkpoint.save import Saver, new_attempt
from pipeline.core.errors import CheckpointError, Diverged, InfrastructureError
from pipeline.core.storage import Storage
from pipeline.core.world import World
from tests.checkpoints import KEEP_ALL, commit_fragments

SMALL = {"history.jsonl": b"", "model.json": b"{}"}


def numbers(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def contents(memory: HostMemory) -> bytes:
    return os.pread(memory.fd, memory.bytes, 0)


# In a file


def test_a_file_is_plain_safetensors() -> None:
    fragments = [
        Fragment("weight", "a", 3, numbers(5)),
        Fragment("buffer", "count", 0, torch.tensor([7])),
        Fragment("weight", "half", 0, numbers(3, 1, torch.bfloat16)),
        Fragment("random", "cpu.0", 0, torch.arange(9, dtype=torch.uint8)),
        Fragment("exp_avg", "a", 3, numbers(5, 2)),
    ]
    memory = HostMemory(fragments)
    memory.fill(fragments)
    found = load(contents(memory))
    assert {name: t.tolist() for name, t in found.items()} == {f"{f.key}/{f.name}@{f.start}": f.tensor.tolist() for f in fragments}
    assert all(p.offset % p.itemsize == 0 for p in memory.pieces), "whole numbers in every block"
    fragments[0].tensor.zero_()
    memory.fill(fragments)
    assert not load(contents(memory))["weight/a@3"].any(), "filled anew"
    memory.close()


def test_large_tensors_and_small_ones_are_copied_whole() -> None:
    """By several threads, in pieces that are no multiple of anything."""
    sizes = [3_000_001, 5, 2_000_003, 1, 1_048_576]
    fragments = [Fragment("weight", f"p{n}", 0, numbers(size, n)) for n, size in enumerate(sizes)]
    memory = HostMemory(fragments)
    for _ in range(2):
        memory.fill(fragments)
        found = load(contents(memory))
        assert all(torch.equal(found[f"weight/{f.name}@0"], f.tensor) for f in fragments)
        for f in fragments:
            f.tensor.neg_()
    memory.close()


def test_a_file_in_tmpdir_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is too little memory: here, among so many ranks of this host."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files = {}
    for where, ranks in (("memory", 1), ("disk", 10**12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        b = Background(Storage(str(tmp_path / where)), 100_000)
        b.begin(5)
        assert b.end().error is None
        place = os.readlink(f"/proc/self/fd/{b.saver.memory.fd}")
        assert place.startswith(str(tmp_path / "temporary")) == (where == "disk") == b.saver.memory.is_on_disk, place
        b.saver.close()
        commit = b.checkpoints.read(5)
        verify(b.checkpoints, commit)
        files[where] = b.checkpoints.directory.read(f"{commit.prefix}/rank-00000-of-00001.safetensors")
    assert files["memory"] == files["disk"] and not any((tmp_path / "temporary").iterdir())


def cgroup(path: Path, limit: int | str, used: int, pages: int, version: int = 2) -> None:
    """The files of one, as the kernel shows them."""
    names = ("memory.max", "memory.current", "") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    path.mkdir(parents=True)
    (path / names[0]).write_text(f"{limit}\n")
    (path / names[1]).write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\nfile 9\n{names[2]}inactive_file {pages}\n")


def test_the_memory_that_a_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    root, own = tmp_path / "cgroup", tmp_path / "own"
    here = free_memory(root, own)
    assert 0 < here <= psutil.virtual_memory().total, "without cgroups, what the host has"

    own.write_text("0::/job/step\n")
    cgroup(root / "job", 1000, 700, 50)
    cgroup(root / "job/step", "max", 600, 0)
    assert free_memory(root, own) == 350, "the limit of an outer one counts"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(root, own) == 87, "of four ranks each has a share"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    (root / "job/step/memory.max").write_text("800\n")
    assert free_memory(root, own) == 200, "the tightest does"
    (root / "job/memory.current").write_text("2000\n")
    assert free_memory(root, own) == 0

    own.write_text("12:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n0::/\n")
    cgroup(tmp_path / "one/memory", 900, 500, 100, version=1)  # a container that sees its own as the root
    assert free_memory(tmp_path / "one", own) == 500
    cgroup(tmp_path / "one/memory/docker/x", 2**63 - 4096, 500, 0, version=1)
    assert free_memory(tmp_path / "one", own) == 500, "no limit, as version 1 says it"

    own.write_text("0::/docker/x\n")
    cgroup(tmp_path / "two/root", 300, 100, 0)
    assert free_memory(tmp_path / "two/root", own) == 200


def test_an_index_comes_back() -> None:
    _, pieces, size = lay_out([Fragment("weight", "a/b c@d", 3, numbers(5))])
    index = Index("rank.safetensors", size, BLOCK, ["00"], pieces)
    assert Index.parse(index.to_json()) == index


@given(numel=st.integers(1, 40), size=st.integers(1, 9))
def test_shares_are_all_of_it_once(numel: int, size: int) -> None:
    tensor = torch.arange(numel).view(1, -1)
    shares = [own_share("weight", "a", tensor, rank, size) for rank in range(size)]
    there = [s for s in shares if s is not None]
    assert torch.cat([s.tensor for s in there]).tolist() == list(range(numel))
    assert all(s.tensor[0] == s.start for s in there)


# From one cut to another


def cut(tensors: dict[str, torch.Tensor], edges: Sequence[float]) -> list[list[Fragment]]:
    """Each tensor cut at these parts of its length: the fragments of so many ranks and one."""
    ranks: list[list[Fragment]] = [[] for _ in range(len(edges) + 1)]
    for name, tensor in tensors.items():
        at = [0, *(round(edge * tensor.numel()) for edge in sorted(edges)), tensor.numel()]
        for rank, fragments in enumerate(ranks):
            if at[rank + 1] > at[rank]:
                fragments.append(Fragment("weight", name, at[rank], tensor[at[rank] : at[rank + 1]].clone()))
    return ranks


def written(store: Storage, ranks: list[list[Fragment]]) -> tuple[Checkpoints, Commit, list[Index]]:
    """A checkpoint of several ranks, each of whose files was made by a saver of its own."""
    checkpoints = Checkpoints(store)
    lease = checkpoints.acquire()
    indices = []
    for n, fragments in enumerate(ranks):
        commit = commit_fragments(checkpoints, lease, fragments, 5 + n, SMALL)
        (index,) = checkpoints.indices(commit)
        data = checkpoints.directory.read(f"{commit.prefix}/{index.file}")
        checkpoints.directory.write(f"step-5/{checkpoints.read(5).attempt}/part-{n}", data)
        indices.append(Index(f"part-{n}", index.size, index.block, index.blocks, index.pieces))
    return checkpoints, checkpoints.read(5), indices


@pytest.mark.parametrize("edges", [[0.5], [0.1, 0.2, 0.9]])
def test_any_cut_reads_any_other(tmp_path: Path, edges: list[float]) -> None:
    tensors = {"large": numbers(3_000_000), "tiny": numbers(3, 1), "one": numbers(1, 2)}
    checkpoints, commit, indices = written(Storage(str(tmp_path)), cut(tensors, edges))
    for others in ([], [0.5], [0.3, 0.31, 0.7], [k / 7 for k in range(1, 7)]):
        for fragments in cut(tensors, others):
            for f in fragments:
                f.tensor.fill_(-1)
            read_into(checkpoints, commit, indices, fragments)
            assert all(torch.equal(f.tensor, tensors[f.name][f.start : f.stop]) for f in fragments)


def test_only_the_blocks_that_are_wanted_are_fetched(store: Storage) -> None:
    large = numbers(5 * BLOCK // 4)  # five blocks and a header
    commit = commit_fragments(checkpoints := Checkpoints(store), checkpoints.acquire(), [Fragment("weight", "a", 0, large)], 5, SMALL)
    out = torch.zeros(10)
    assert read_into(checkpoints, commit, checkpoints.indices(commit), [Fragment("weight", "a", 2 * BLOCK // 4, out)]) == BLOCK
    assert torch.equal(out, large[2 * BLOCK // 4 :][:10])
    across = torch.zeros(2_000_000)
    fetched = read_into(checkpoints, commit, checkpoints.indices(commit), [Fragment("weight", "a", 1_000_000, across)])
    assert torch.equal(across, large[1_000_000:3_000_000]) and fetched == 3 * BLOCK


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "index"])
def test_every_byte_that_is_read_is_verified(store: Storage, damage: str) -> None:
    checkpoints = Checkpoints(store)
    lease, state = checkpoints.acquire(), [Fragment("weight", "a", 0, numbers(2 * BLOCK // 4))]
    commit_fragments(checkpoints, lease, state, 5, SMALL)
    commit = commit_fragments(checkpoints, lease, state, 9, SMALL)
    indices = checkpoints.indices(commit)
    assert verify(checkpoints, commit) == sum(r.bytes for r in commit.files)
    key = f"checkpoints/{commit.prefix}/{indices[0].file}"
    data = bytearray(store.read(key))
    if damage == "flipped":
        data[-1] ^= 1
        store.write(key, bytes(data))
    elif damage == "cut":
        store.write(key, bytes(data[:-5]))
    elif damage == "missing":
        store.remove(key)
    else:
        store.write(f"checkpoints/{commit.prefix}/rank-00000-of-00001.json", indices[0].to_json().replace(b'"a"', b'"b"'))
    out = [Fragment("weight", "a", BLOCK // 4, torch.zeros(BLOCK // 4))]
    with pytest.raises(CheckpointError, match=r"step-9/.*(is damaged|is missing)"):
        read_into(checkpoints, commit, checkpoints.indices(commit), out)
    with pytest.raises(CheckpointError, match=r"step-9/.*(is damaged|is missing)"):
        verify(checkpoints, commit)
    sound = newest_sound(checkpoints)
    assert sound is not None and sound.step == 5 and checkpoints.steps() == [5]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    commit = commit_fragments(checkpoints, checkpoints.acquire(), [Fragment("weight", "a", 10, numbers(5))], 5, SMALL)
    for key, name, start in (("weight", "a", 8), ("weight", "a", 12), ("weight", "b", 10), ("exp_avg", "a", 10)):
        with pytest.raises(CheckpointError, match=rf"holds no {key} of {name} from number"):
            read_into(checkpoints, commit, checkpoints.indices(commit), [Fragment(key, name, start, torch.zeros(4))])


# In the background


class Background:
    """A saver alone, and what it saves."""

    def __init__(
        self, store: Storage, count: int = 1000, patience: float = 20.0, retention: Retention = KEEP_ALL, key: str = "weight"
    ) -> None:
        self.checkpoints = Checkpoints(store)
        self.lease = self.checkpoints.acquire()
        self.fragments = [Fragment(key, "a", 0, numbers(count))]
        self.saver = Saver(self.checkpoints, self.lease, self.fragments, retention, patience, World())

    def begin(self, step: int) -> None:
        commit = Commit(step, step, self.lease.generation, new_attempt(self.lease), 1, 0, "view", "config", [])
        self.saver.begin(self.fragments, commit, SMALL)

    def end(self) -> Any:
        outcome = self.saver.take(timeout=60)
        assert outcome is not None
        return outcome


def test_training_goes_on_while_it_is_saved(store: Storage) -> None:
    b = Background(store, 4_000_000)
    assert b.saver.is_free
    for step in (5, 6):
        b.begin(step)
        assert not b.saver.is_free
        b.fragments[0].tensor.add_(1)  # the next step
        outcome = b.end()
        assert outcome.error is None and outcome.step == step and 0 < outcome.stall < outcome.seconds
    b.saver.close()
    for step, ahead in ((5, 2), (6, 1)):
        commit, out = b.checkpoints.read(step), torch.zeros(4_000_000)
        read_into(b.checkpoints, commit, b.checkpoints.indices(commit), [Fragment("weight", "a", 0, out)])
        assert torch.equal(out + ahead, b.fragments[0].tensor) or torch.allclose(out + ahead, b.fragments[0].tensor, atol=1e-6)


def test_a_block_that_is_damaged_on_its_way_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = Background(Storage(str(tmp_path)), 1000)
    b.begin(5)
    assert b.end().error is None
    b.saver.close()
    read, seen = Storage.read_into, []

    def damaged_once(self: Storage, key: str, start: int, room: memoryview) -> int:
        count = read(self, key, start, room)
        if not seen:
            room[count // 2] ^= 1
        seen.append(key)
        return count

    monkeypatch.setattr(Storage, "read_into", damaged_once)
    commit, out = b.checkpoints.read(5), torch.zeros(1000)
    read_into(b.checkpoints, commit, b.checkpoints.indices(commit), [Fragment("weight", "a", 0, out)])
    assert torch.equal(out, b.fragments[0].tensor) and len(seen) == 2


def test_whatever_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = Background(Storage(str(tmp_path)))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    b.begin(5)
    outcome = b.end()
    b.saver.close()
    assert isinstance(outcome.error, InfrastructureError) and "checkpoint at step 5 failed (FileNotFoundError" in str(outcome.error)


@pytest.mark.parametrize("key", ["weight", "buffer", "average"])
def test_a_diverged_model_is_not_saved(tmp_path: Path, key: str) -> None:
    b = Background(Storage(str(tmp_path)), key=key)
    b.fragments[0].tensor[500] = float("nan")
    b.begin(5)
    outcome = b.end()
    b.saver.close()
    assert isinstance(outcome.error, Diverged) and "a is no longer finite at step 5, which is not saved" in str(outcome.error)
    assert b.checkpoints.steps() == []


def test_a_killed_upload_is_one_failed_save(tmp_path: Path) -> None:
    b = Background(Storage(str(tmp_path)))
    b.begin(5)
    assert b.end().error is None
    uploader = b.saver._uploader
    assert uploader is not None
    os.kill(uploader.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(uploader.pid)], timeout=10) if psutil.pid_exists(uploader.pid) else None
    b.begin(6)
    assert isinstance(b.end().error, InfrastructureError)
    b.begin(7)
    assert b.end().error is None, "another process takes its place"
    b.saver.close()
    assert b.checkpoints.steps() == [5, 7]


def test_the_uploading_process_dies_with_its_owner(tmp_path: Path) -> None:
    b = Background(Storage(str(tmp_path)))
    b.begin(5)
    b.end()
    uploader = b.saver._uploader
    assert uploader is not None and uploader._process.stdin is not None
    uploader._process.stdin.close()  # what a kill -9 of its owner does
    assert uploader._process.wait(timeout=10) == 0
    b.saver.close()


def test_signals_are_for_the_owner(tmp_path: Path) -> None:
    b = Background(Storage(str(tmp_path)))
    b.begin(5)
    b.end()
    uploader = b.saver._uploader
    assert uploader is not None
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(uploader.pid, each)
    time.sleep(0.2)
    b.begin(6)
    assert b.end().error is None
    b.saver.close()


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), data=st.data())
def test_layouts_have_no_gaps(sizes: list[int], data: st.DataObject) -> None:
    types = data.draw(st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]), min_size=6, max_size=6))
    fragments = [Fragment("k", str(n), n, torch.zeros(size, dtype=types[n])) for n, size in enumerate(sizes)]
    header, pieces, total = lay_out(fragments)
    end = len(header)
    for p in pieces:
        assert p.offset == end
        end += p.numel * p.itemsize
    assert end == total and json.loads(header[8:])
