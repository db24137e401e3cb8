"""Keys as numbers: found exactly where a set of strings would find them, at a seventh of its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.digests import DigestTable, halves, parse_digests, short_keys

KEYS = st.lists(
    st.one_of(
        st.text("0123456789abcdef", min_size=20, max_size=20),
        st.text("01", min_size=0, max_size=20),
        st.text("0123456789abcdefABg\0é", min_size=0, max_size=24),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(keys=KEYS, cut=st.integers(0, 5))
def test_digests_are_told_from_other_strings(keys: list[str], cut: int) -> None:
    column = pa.chunked_array([pa.array(keys[:3], pa.string()), pa.array(keys[3:], pa.string())])[cut:]
    fits, digests = parse_digests(column, 20)
    strings = column.to_pylist()
    are = [len(k) == 20 and set(k) <= set("0123456789abcdef") for k in strings]
    assert fits.tolist() == are and [bytes(d).hex() for d in digests] == [k for k, is_ in zip(strings, are, strict=True) if is_]


@settings(max_examples=200, deadline=None)
@given(keys=KEYS)
def test_short_keys_are_told_apart(keys: list[str]) -> None:
    fits, padded = short_keys(pa.array(keys, pa.string()))
    are = [len(k.encode()) <= 16 and "\0" not in k for k in keys]
    assert fits.tolist() == are
    assert [bytes(p).rstrip(b"\0").decode() for p in padded] == [k for k, is_ in zip(keys, are, strict=True) if is_]


@settings(max_examples=200, deadline=None)
@given(
    there=st.lists(st.binary(min_size=10, max_size=10), max_size=40),
    high=st.binary(min_size=8, max_size=8),
    ends=st.lists(st.binary(min_size=2, max_size=2), max_size=20),
    asked=st.lists(st.binary(min_size=10, max_size=10), max_size=20),
)
def test_a_table_finds_what_a_set_would(there: list[bytes], high: bytes, ends: list[bytes], asked: list[bytes]) -> None:
    """Those that share their first 8 bytes too."""
    there = there + [high + end for end in ends[::2]]
    asked = asked + [high + end for end in ends] + there[::3]

    def halved(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return halves(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 10))

    table = DigestTable(*halved(there))
    assert len(table) == len(set(there))
    found = table.find(*halved(asked)).tolist()
    ordered = sorted(set(there))
    assert found == [ordered.index(a) if a in ordered else -1 for a in asked]


def test_ten_bytes_a_key() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (500_000, 10), dtype=np.uint8)
    tracemalloc.start()
    table = DigestTable(*halves(digests))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 500_000 and held < 11 * 500_000 and peak < 60 * 500_000
    assert (table.find(*halves(digests[:1000])) >= 0).all()
