"""Make a dataset of tars that others wrote, in place: an index beside each, the table of shards, the manifest last.

The tars themselves are only read, each once, from front to back.
"""

from __future__ import annotations

import heapq
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field

from pipeline.config import fingerprint
from pipeline.core.errors import CredentialsError, DataError, StorageError, UserError
from pipeline.core.storage import Storage
from pipeline.shards.index import TarIndex, index_schema, smallest
from pipeline.shards.manifest import INDEX_SCHEMA, NAMED, Manifest, ShardRecord, dataset_hash, find_manifest, publish, table_bytes
from pipeline.shards.tars import Tape, read_blocks
from pipeline.shards.tasks import run_tasks
from pipeline.shards.work import forget

AUTO = "auto"  # as a split: each tar's own, the word before the first dash of its name
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_FAILURES = 100  # tars that may fail before the others are given up too
_LISTED = 10  # names in one sentence


@dataclass(frozen=True)
class Options:
    """What decides an index. `classes`: their names, None for numbers. `columns`: numbers to take from the samples' json."""

    split: str = "train"
    classes: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdoptedTar:
    """What one task sends back. `record` is None for a tar without a sample that can be used; `named` as in a manifest."""

    name: str
    record: ShardRecord | None = None
    smallest: tuple[int, int] = (0, 0)
    largest_label: int = -1
    ignored: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: list[dict[str, str]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)  # by column, how many samples have one
    remark: str = ""  # on how the tar ends
    failure: UserError | None = None


@dataclass
class _Sums:
    """What is kept of the tars as they come: for a million of them not much more than the table of shards."""

    records: list[ShardRecord] = field(default_factory=list)
    smallest: tuple[int, int] = (2**31, 2**31)
    largest_label: int = -1
    samples: int = 0
    ignored: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, str]] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    failures: dict[str, UserError] = field(default_factory=dict)  # by tar

    def add(self, tar: AdoptedTar) -> None:
        if tar.record is not None:
            self.records.append(tar.record)
            self.samples += tar.record.samples
            self.smallest = min(self.smallest[0], tar.smallest[0]), min(self.smallest[1], tar.smallest[1])
        self.largest_label = max(self.largest_label, tar.largest_label)
        self.ignored += tar.ignored
        self.dropped.update(tar.dropped)
        if tar.named:
            self.named = heapq.nsmallest(NAMED, self.named + tar.named, key=_tars_first)
        self.numbers.update(tar.numbers)
        if tar.remark:
            self.remarks.append(tar.remark)
        if tar.failure is not None:
            self.failures[tar.name] = tar.failure

    def told(self) -> str:
        return f"{self.samples:,} samples, {self.dropped.total():,} dropped"


def adopt(directory: Storage, options: Options, workers: int | None = None, force: bool = False) -> tuple[Manifest, list[str]]:
    """Index every *.tar that lies directly at `directory`. Needs a Ray that is initialised. May be interrupted and repeated. Of a dataset
    that it replaces there stay the tars, and what was taken down (`forget`).

    Returns the manifest, and remarks: on tars that do not end as they should, and columns that no sample has.

    Raises:
        DataError: no tars, compressed ones, a dataset that is there already (`force` replaces it), nothing that can be used.
        StorageError: the place cannot be written, or some tars could not be read; they are named.
        InfrastructureError: a machine failed more often than tasks are retried.
    """
    splits = check(directory, options, force)
    directory.check_writable()
    forget(directory)  # its indices will be made anew
    jobs, sums = [(1, item) for item in splits.items()], _Sums()
    tasks = run_tasks("adopt", "tars", adopt_tar, jobs, (directory, options), workers, sums.told)
    for tar in tasks:
        sums.add(tar)
        if len(sums.failures) >= _MOST_FAILURES:
            tasks.close()
    if sums.failures:
        _refuse(directory, len(splits), sums.failures)
    manifest = _manifest(directory, options, sorted(set(splits.values())), sums)
    publish(directory, sums.records, manifest)
    missing = [f"no sample has a number {column!r} in its json" for column in options.columns if not sums.numbers[column]]
    return manifest, sorted(sums.remarks) + missing


def check(directory: Storage, options: Options, force: bool) -> dict[str, str]:
    """The split of each tar to adopt, by name; raises what `adopt` refuses before it starts."""
    clash = [column for column in options.columns if column in INDEX_SCHEMA.names]
    if clash:
        raise DataError(f"--column {clash[0]}: every index has this column already (it has {', '.join(INDEX_SCHEMA.names)})")
    splits = {name: split_of(name, options.split) for name in list_tars(directory)}
    if not force and (there := find_manifest(directory)) is not None:
        raise DataError(f"data {directory.url}: a dataset of {there.written:,} samples is here already; --force indexes its tars anew")
    return splits


def list_tars(directory: Storage) -> list[str]:
    """The names of the tars directly at `directory`, sorted.

    Raises:
        DataError: there are none, or compressed ones.
    """
    if directory.url.endswith((".tar", *_COMPRESSED)):
        raise DataError(f"data {directory.url}: this names a tar; what is adopted is the folder that holds the tars")
    names = [name for name in directory.names() if not name.startswith(".")]
    compressed = [name for name in names if name.endswith(_COMPRESSED)]
    if compressed:
        raise DataError(
            f"data {directory.url}: {compressed[0]} ({len(compressed)} in all) is compressed, so that samples cannot be read by "
            "their place in it; unpack such tars (gunzip), or move them away"
        )
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise DataError(f"data {directory.url}: there are no tars here (*.tar; those in sub-folders are not taken)")
    return tars


def split_of(name: str, split: str) -> str:
    """Raises DataError where the split is to be read off a name that has none."""
    if split != AUTO:
        return split
    word, dash, _ = name.partition("-")
    if not (word and dash):
        raise DataError(
            f"--split {AUTO}: {name} does not begin with a split and a dash, as train-00000.tar does; --split NAME takes all as one"
        )
    return word


def adopt_tar(name: str, split: str, directory: Storage, options: Options) -> AdoptedTar:
    """Read one tar and write its index (the body of a Ray task)."""
    index = TarIndex(None if options.classes is None else len(options.classes), options.columns)
    tape = Tape(read_blocks(directory, name))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata
            end = index.read(tape)
        trailing = not tape.drain()
        if end.kind == "compressed":
            raise DataError(f"{directory.url}/{name}: {end}")
        rows = index.rows
        record = ShardRecord(name, split, len(rows), tape.position, tape.whole.hexdigest())
        if rows:
            directory.write(record.index_name, table_bytes(rows, index_schema(options.columns)))
        else:
            directory.remove(record.index_name)  # of an earlier adoption
    except FileNotFoundError:
        return AdoptedTar(name, failure=StorageError(f"{directory.url}/{name}: it vanished after it was listed"))
    except (DataError, StorageError, CredentialsError) as e:
        return AdoptedTar(name, failure=e)
    remark = f"{name}: {end}" if end.kind != "whole" else f"{name}: what follows its end-of-archive marker is not read" if trailing else ""
    named = [_named(name, key, drop.reason, drop.detail, end.is_cut and drop.reason == end.kind) for key, drop in index.dropped]
    return AdoptedTar(
        name=name,
        record=record if rows else None,
        smallest=smallest(rows) if rows else (0, 0),
        largest_label=max((row["cls"] for row in rows), default=-1),
        ignored=index.ignored,
        dropped=dict(Counter(drop.reason for _, drop in index.dropped)),
        named=heapq.nsmallest(NAMED, named, key=_tars_first),
        numbers={column: sum(row[column] is not None for row in rows) for column in options.columns},
        remark=remark + (f"; {len(rows):,} samples before that are taken" if end.is_cut else ""),
    )


def _refuse(directory: Storage, tars: int, failures: dict[str, UserError]) -> None:
    kind = StorageError if all(isinstance(f, StorageError) for f in failures.values()) else DataError
    told = "; ".join(str(failures[name]) for name in sorted(failures)[:_LISTED]) + ("; .." if len(failures) > _LISTED else "")
    least = "at least " if len(failures) >= _MOST_FAILURES else ""
    raise kind(f"data {directory.url}: {least}{len(failures)} of its {tars} tars cannot be adopted, so none is: {told}")


def _named(tar: str, key: str, reason: str, detail: str, is_tar: bool) -> dict[str, str]:
    """A cut tar is named itself, and the one sample that it breaks in the detail."""
    if is_tar:
        return {"file": tar, "reason": reason, "detail": f"{detail}; left out: sample {key}" if key else detail}
    return {"file": f"{tar}/{key}", "reason": reason, "detail": detail}


def _tars_first(drop: dict[str, str]) -> tuple[bool, str, str]:
    return not drop["file"].endswith(".tar"), drop["file"], drop["detail"]


def _manifest(directory: Storage, options: Options, splits: list[str], sums: _Sums) -> Manifest:
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(sums.dropped.items())) or "there are none"
    counts = dict.fromkeys(splits, 0)
    for record in sums.records:
        counts[record.split] += record.samples
    for split, count in counts.items():
        if not count:
            raise DataError(f"data {directory.url}: no sample of split {split!r} can be used (of all tars: {reasons})")
    return Manifest(
        hash=dataset_hash(sums.records),
        config=fingerprint({"adopted": asdict(options)}),
        source=directory.url,
        classes=list(options.classes if options.classes is not None else map(str, range(sums.largest_label + 1))),
        splits=counts,
        bytes=sum(r.bytes for r in sums.records),
        read=sums.samples + sums.dropped.total(),
        written=sums.samples,
        ignored=sums.ignored,
        dropped=dict(sorted(sums.dropped.items())),
        dropped_samples=sums.named,
        unnamed=sums.dropped.total() - len(sums.named),
        smallest=sums.smallest,
    )
