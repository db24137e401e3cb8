"""Follow a run in MLflow, without ever stopping or slowing it. The only user of mlflow.

Every record is first appended to a local spool (one JSON line, flushed), and a thread sends what the spool holds and
notes how far it came. So a server that is down, slow or gone costs nothing and loses nothing: what could not be sent is
sent when it is back, by this process or, after a restart, by the next one, to the same MLflow run. A run is found by
the tag `tessera.key`, which the spool knows even where MLflow has never heard of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.core.errors import StorageError
from pipeline.core.progress import say

_RETRY_AFTER = 5.0  # seconds
_WAIT_FOR_LOCK = 60.0  # seconds
_BATCH = 500  # records sent at once
_METRICS = 1000  # in one request; MLflow takes no more
KEY_TAG = "tessera.key"


class Tracker:
    """One MLflow run, named by `key`: the same key is the same run, now and after any restart.

    Args:
        uri: the tracking URI, `sqlite:///..` or `http(s)://..`.
        experiment: its experiment, made where it does not exist.
        key: what identifies the run for ever, such as a run's id, or `id/stage`.
        name: what people see.
        spool: a local directory for what is not sent yet.
        artifacts: where a new experiment keeps artifacts (SQLite has no server that would choose).
        parent: the key of the run that this one is nested in.
    """

    def __init__(
        self, uri: str, experiment: str, key: str, name: str, spool: Path, *, artifacts: str | None = None, parent: str | None = None
    ) -> None:
        self.uri, self.experiment, self.key, self.name = uri, experiment, key, name
        self.artifacts, self.parent = artifacts, parent
        self.directory = spool / hashlib.sha256(f"{uri}\n{key}".encode()).hexdigest()[:16]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._file = (self.directory / "records.jsonl").open("a+b", buffering=0)
            self._end_cut_line()
        except OSError as e:
            raise StorageError(f"tracking: records cannot be kept in {self.directory} ({e.strerror})") from e
        self._wake, self._closing, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._warned = self._lost = False
        self._sender = threading.Thread(target=self._send_all, name=f"tracking {name}", daemon=True)
        self._sender.start()

    def _take_lock(self) -> TextIO:
        """One writer a spool: wait for another process of this run, which may be dying; a dead one's lock is gone with it.

        Raises:
            StorageError: it is alive and well.
        """
        path = self.directory / "lock"
        deadline = time.monotonic() + _WAIT_FOR_LOCK
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:  # or it went with a spool that was all sent
                    return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(f"tracking: another process of this run holds {path}; is this run running twice?") from None
            lock.close()
            time.sleep(0.2)

    def params(self, values: Mapping[str, Any]) -> None:
        self._append("params", values={k: str(v)[:6000] for k, v in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        self._append("tags", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._append("metrics", values={k: float(v) for k, v in values.items()}, step=step)

    def artifact(self, folder: str, name: str, data: bytes) -> None:
        """Keep `data` as the artifact `folder/name`."""
        kept = self.directory / "files" / hashlib.sha256(data).hexdigest()[:16] / name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        except OSError as e:
            self._warn_of_loss(e)
            return
        self._append("artifact", folder=folder, file=str(kept.relative_to(self.directory)))

    def close(self, status: str = "FINISHED", timeout: float = 60) -> bool:
        """End the run with an MLflow status. Waits until all is sent, `timeout` seconds at most, and not at all where
        the server does not answer; tells whether all was sent. What was not stays in the spool."""
        self._append("end", status=status)
        self._closing.set()
        self._wake.set()
        deadline = time.monotonic() + timeout
        while self._sender.is_alive() and time.monotonic() < deadline and not self._failed.is_set():
            self._sender.join(0.05)
        sent = not self._sender.is_alive() and not self._failed.is_set()
        self._file.close()
        if sent:
            shutil.rmtree(self.directory)
        else:
            say(
                f"warning: tracking {redact(self.uri)}: not everything was sent; "
                f"it is kept in {self.directory} and sent by the next run of this config"
            )
        self._lock.close()
        return sent and not self._lost

    def _end_cut_line(self) -> None:
        """What a crash cut short gets its newline, so that the next record is on a line of its own."""
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def _append(self, kind: str, **record: Any) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **record}).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self._warn_of_loss(e)
        self._wake.set()

    def _warn_of_loss(self, error: OSError) -> None:
        if not self._lost:
            say(f"warning: tracking {redact(self.uri)}: records are lost, they cannot be kept in {self.directory} ({error.strerror})")
        self._lost = True

    # The sender's thread

    def _send_all(self) -> None:
        connection: _Connection | None = None
        while True:
            closing = self._closing.is_set()  # before looking: nothing is recorded after it
            records, position = self._unsent()
            if not records:
                if closing:
                    return
                self._wake.wait(_RETRY_AFTER)
                self._wake.clear()
                continue
            try:
                connection = connection or _Connection(self)
                connection.send(records, self.directory)
                (self.directory / "sent.tmp").write_text(str(position))
                (self.directory / "sent.tmp").replace(self.directory / "sent")
            except Exception as e:  # noqa: BLE001  whatever goes wrong in the server or its client must not reach training
                self._warn(e)
                self._failed.set()
                if self._closing.wait(_RETRY_AFTER):
                    return
                continue
            self._failed.clear()

    def _unsent(self) -> tuple[list[dict[str, Any]], int]:
        """The next records, and the position in the spool after them. A line that a crash cut short is left out."""
        sent = self.directory / "sent"
        start = int(sent.read_text()) if sent.exists() else 0
        records: list[dict[str, Any]] = []
        with (self.directory / "records.jsonl").open("rb") as f:
            f.seek(start)
            while len(records) < _BATCH and (line := f.readline()).endswith(b"\n"):
                start += len(line)
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue  # a cut line that a later process wrote on after
        return records, start

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(
                f"warning: tracking {redact(self.uri)} does not answer; "
                f"records are kept in {self.directory} and sent when it is back ({redact(reason)[:200]})"
            )
        self._warned = True


class _Connection:
    """An MLflow client with this tracker's experiment and run found or made."""

    def __init__(self, tracker: Tracker) -> None:
        # Fail soon: the spool retries better than a blocked call. Nothing is reported to anyone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        for name in ("mlflow", "alembic"):  # making the first SQLite database is told in many lines otherwise
            logging.getLogger(name).setLevel(logging.WARNING)

        self.error = MlflowException
        self.client = MlflowClient(tracking_uri=tracker.uri)
        self.experiment = self._find_experiment(tracker)
        self.parent = self._find_run(tracker.parent, {"mlflow.runName": tracker.name.partition("/")[0]}) if tracker.parent else None
        tags = {"mlflow.runName": tracker.name, **({"mlflow.parentRunId": self.parent} if self.parent else {})}
        self.run = self._find_run(tracker.key, tags)
        self.params = dict(self.client.get_run(self.run).data.params)

    def _find_experiment(self, tracker: Tracker) -> str:
        found = self.client.get_experiment_by_name(tracker.experiment)
        if found is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(tracker.experiment, artifact_location=tracker.artifacts)
        except self.error:
            found = self.client.get_experiment_by_name(tracker.experiment)
            if found is None:
                raise
            return found.experiment_id  # another process was quicker

    def _find_run(self, key: str, tags: dict[str, str]) -> str:
        """The MLflow id of the run with this key, which is made where there is none."""
        found = self.client.search_runs([self.experiment], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        return self.client.create_run(self.experiment, tags={KEY_TAG: key, **tags}).info.run_id

    def send(self, records: list[dict[str, Any]], directory: Path) -> None:
        from mlflow.entities import Metric, Param

        batch: list[Metric] = []
        for record in [*records, {"kind": "flush"}]:
            if record["kind"] == "metrics":
                batch += [Metric(k, v, record["time"], record["step"]) for k, v in record["values"].items()]
                if len(batch) < _BATCH:
                    continue
            for start in range(0, len(batch), _METRICS):
                self.client.log_batch(self.run, metrics=batch[start : start + _METRICS])
            batch = []
            match record["kind"]:
                case "params":  # parameters of a run never change
                    params = [Param(k, v) for k, v in record["values"].items() if k not in self.params]
                    for start in range(0, len(params), 100):
                        self.client.log_batch(self.run, params=params[start : start + 100])
                    self.params |= record["values"]
                case "tags":
                    for name, value in record["values"].items():
                        self.client.set_tag(self.run, name, value)
                case "artifact":
                    self.client.log_artifact(self.run, str(directory / record["file"]), record["folder"] or None)
                case "end":
                    self.client.set_terminated(self.run, record["status"], end_time=record["time"])


def redact(uri: str) -> str:
    """A URI without the user and password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//***@", uri)
