"""A dataset that is damaged in the store, under a run that is killed as well: the same samples give way to the same others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.core.storage import Storage
from tests.cluster.data import PER_SHARD, SAMPLES, half_write_shard, key_of, make_data, truncate_shard
from tests.cluster.evidence import SAME_SIZE, check_run, check_samples, loss_of
from tests.cluster.here import STEPS_HERE, Here
from tests.cluster.runs import BATCH, Row, running

AT = 64
BROKEN = (7, 500)  # samples
assert STEPS_HERE * BATCH == 3 * SAMPLES, "each sample is met three times"

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

Told = dict[str, Any]


def _both(here: Here, name: str, damage: Callable[[Storage], None], told: Told, broken: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Train on a damaged dataset, undisturbed and with a worker killed; gives the ledger of replaced samples, the same for both."""
    directory = Storage(f"{here.bucket}/{name}", here.endpoint)
    make_data(directory, broken)
    damage(directory)
    whole = here.config(f"{name}-undisturbed", data=name)
    with running(here.start(whole, "pretrain.loader.bad=1.0", "pretrain.save.every=10 minutes")) as job:
        job.ends_with(0)
    values = here.config(f"{name}-killed", data=name)
    with running(here.start(values, "pretrain.loader.bad=1.0")) as job:
        moment = job.at_step(AT)
        job.ranks()[-1].kill()
        job.ends_with(0)
    reference, run = here.run(whole), here.run(values)
    replaced = run.loader()["replaced"]
    assert replaced == reference.loader()["replaced"], "the same samples, and the same in their place"
    keys = [entry["key"] for entry in replaced]
    check_samples(reference, STEPS_HERE, keys)
    told |= loss_of(job, moment, run) | {"losses": check_run(run, reference.history(), STEPS_HERE, SAME_SIZE, keys)}
    return replaced


@pytest.mark.fault("truncated tar", "the latter half of a shard is gone; a worker is killed too; against an unkilled run of the same data")
def test_truncated_tar(here: Here, told: Told) -> None:
    replaced = _both(here, "truncated", lambda d: truncate_shard(d, 2), told)
    shard = {key_of(n) for n in range(2 * PER_SHARD, 3 * PER_SHARD)}
    lost = {entry["key"] for entry in replaced}
    assert lost <= shard and PER_SHARD // 3 < len(lost) < PER_SHARD * 2 // 3, "about half of that shard"
    assert len(replaced) == 3 * len(lost), "once an epoch"
    assert {entry["reason"] for entry in replaced} <= {"truncated", "checksum"}


@pytest.mark.fault("corrupt JPEG", "two images are nothing but a header; a worker is killed too; against an unkilled run of the same data")
def test_corrupt_jpeg(here: Here, told: Told) -> None:
    replaced = _both(here, "corrupt", lambda directory: None, told, BROKEN)
    assert sorted(entry["key"] for entry in replaced) == sorted(3 * [key_of(n) for n in BROKEN])
    assert {entry["reason"] for entry in replaced} == {"undecodable"}


@pytest.mark.fault("half-written shard", "it appears beside the others; a worker is killed; no manifest names it, and nobody sees it")
def test_half_written_shard(here: Here, unbroken_here: list[Row], told: Told) -> None:
    directory = Storage(f"{here.bucket}/half", here.endpoint)
    make_data(directory)
    values = here.config("half", data="half")
    with running(here.start(values)) as job:
        moment = job.at_step(AT)
        half_write_shard(directory)
        job.ranks()[-1].kill()
        job.ends_with(0)
    run = here.run(values)
    told |= loss_of(job, moment, run) | {"losses": check_run(run, unbroken_here, STEPS_HERE, SAME_SIZE)}
