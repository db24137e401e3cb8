"""Real DeepSpeed on gloo: what the world size, the ZeRO stage, a restart and a precision may change, and what not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workshop import SPEED, Workshop, close

from pipeline.checkpoint import Checkpoints, find_model, read_history
from pipeline.core.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("train")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    shutil.copytree(root / "data", root / "damaged")
    _flip(root / "damaged" / "train-00001.tar")
    return Workshop(root)


# Two datasets, one of them with a damaged sample; all of DeiT's augmentation.
RICH = (
    "data=[{url: %s/data, weight: 2}, {url: %s/damaged, weight: 1}]",
    "pretrain.loader={bad: 1, block: 4}",
    "pretrain.image={pixels: 8, color_jitter: 0.4, rand_augment: {}, erase: 0.25, mixup: 0.8, cutmix: 1.0, repeats: 2}",
    "pretrain.duration=12 steps",
    "pretrain.save.every=6 steps",  # the second save waits for the end, so it is at a known step
)


def rich(shop: Workshop, name: str) -> dict[str, Any]:
    return shop.job(name, RICH[0] % (shop.root, shop.root), *RICH[1:])


@pytest.fixture(scope="module")
def alone(shop: Workshop) -> list[list[str] | None]:
    """One process: the reference in fp32, bf16 for longer, and fp16."""
    return shop.train(
        1,
        [
            shop.job("alone"),
            shop.job(
                "bf16",
                "pretrain.precision=bf16",
                "pretrain.duration=60 steps",
                "pretrain.save.every=60 steps",
                "pretrain.image={pixels: 8, crop: none}",
                "pretrain.objective.smoothing=0",
            ),
            shop.job("fp16", "pretrain.precision=fp16"),
            shop.job("diverged", "pretrain.optimizer={name: sgd, lr: 1e+30}"),
            shop.job(
                "unseen",
                "pretrain.optimizer={name: sgd, lr: 1e+30, weight_decay: 1e+12}",
                "pretrain.duration=1 step",
                "pretrain.schedule.warmup=null",
            ),
            shop.job("onward", f"pretrain.start={{from: {shop.root}/runs/alone@3, load: all}}"),
            shop.job(
                "finer", f"pretrain.start={{from: {shop.root}/runs/alone@3}}", "pretrain.image.pixels=16", "pretrain.image.enlarge=true"
            ),
            shop.job("abroad", "pretrain.start={from: /elsewhere/run, load: all}"),
            rich(shop, "rich"),
        ],
    )


OFFLOAD = "{stage: 2, offload: optimizer}"


@pytest.fixture(scope="module")
def pair(shop: Workshop, alone: object) -> list[list[str] | None]:
    """Two processes, every ZeRO stage."""
    return shop.train(
        2,
        [shop.job(f"stage{n}", f"pretrain.zero.stage={n}") for n in range(4)]
        + [
            shop.job("offload", f"pretrain.zero={OFFLOAD}"),
            shop.job("pair16", "pretrain.precision=bf16"),
            shop.job("child", f"pretrain.start={shop.root}/runs/alone@3"),
            rich(shop, "rich2"),
            shop.job(
                "stuck",
                "pretrain.optimizer={lr: 0.01, weight_decay: 400.0}",  # multiplies weights by -3 a step
                "pretrain.schedule=constant",
                "pretrain.zero.stage=1",
                "pretrain.duration=100 steps",
                "pretrain.save.every=100 steps",
                "pretrain.log=100 steps",  # or the loss would tell
            ),
        ],
    )


@pytest.fixture(scope="module")
def three(shop: Workshop) -> str:
    """Three processes, by the command that people would use."""
    tracking = f"tracking.uri=sqlite:///{shop.root}/mlflow.db"
    return shop.start(3, ["-m", "pipeline.train.worker", str(shop.root / "config.yaml"), "name=three", "pretrain.zero.stage=1", tracking])


def test_a_run_from_beginning_to_end(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[0] is None
    rows = shop.rows("alone")
    train, held_out = [r for r in rows if "train/loss" in r], [r for r in rows if "validate/loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in held_out] == [3, 6]
    assert train[0]["train/loss"] == pytest.approx(math.log(3), abs=1e-6)  # the head is zero
    assert [r["train/lr"] for r in train][:3] == pytest.approx([2.5e-3, 5e-3, 5e-3])
    assert [(r["samples"], r["epoch"]) for r in train][-1] == (120, 2.4)
    assert all(0 < r["train/grad_norm"] < 100 for r in train)
    assert all(any(k.startswith(s) for k in r) for r in read_history(shop.directory("alone")) if "train/loss" in r for s in SPEED[:4])
    checkpoints = Checkpoints(shop.directory("alone"))
    assert checkpoints.steps() == [3, 6] and checkpoints.read(6).samples == 120
    card, weights = find_model(shop.directory("alone"))
    assert (card.step, card.classes) == (6, ["0", "1", "2"]) and all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_at_every_stage_train_the_same(shop: Workshop, alone: object, pair: list[list[str] | None], stage: int) -> None:
    assert pair[stage] is None
    assert close(shop.rows(f"stage{stage}"), shop.rows("alone"), 1e-5)
    one, two = find_model(shop.directory("alone"))[1], find_model(shop.directory(f"stage{stage}"))[1]
    assert set(one) == set(two)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4
    assert Checkpoints(shop.directory(f"stage{stage}")).read(6).zero_stage == stage


def test_an_optimizer_in_host_memory_trains_the_same(shop: Workshop, alone: object, pair: list[list[str] | None]) -> None:
    assert pair[4] is None
    assert close(shop.rows("offload"), shop.rows("alone"), 1e-5)


def test_three_ranks_train_the_same(shop: Workshop, alone: object, three: str) -> None:
    assert close(shop.rows("three"), shop.rows("alone"), 1e-5)
    assert Checkpoints(shop.directory("three")).read(6).world_size == 3


def test_three_ranks_are_one_run_in_mlflow(shop: Workshop, three: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{shop.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tessera").experiment_id], "tags.`mlflow.runName` = 'three/pretrain'")
    assert len(runs) == 1 and runs[0].info.status == "FINISHED" and runs[0].data.params["pretrain.batch"] == "20"
    sent = [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    assert sent == [(r["step"], r["train/loss"]) for r in shop.rows("three") if "train/loss" in r]
    slowest = client.get_metric_history(runs[0].info.run_id, "guard/slowest_rank")
    assert len(slowest) == len(sent) and all(m.value >= 1 for m in slowest)


def test_bf16_learns(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[1] is None
    losses = [r["train/loss"] for r in shop.rows("bf16") if "train/loss" in r]
    assert len(losses) == 60 and sum(losses[-10:]) / 10 < 0.7 * losses[0]
    assert all(w.dtype.is_floating_point and w.dtype.itemsize == 4 for w in find_model(shop.directory("bf16"))[1].values())


def test_bf16_is_close_to_fp32(shop: Workshop, alone: object, pair: list[list[str] | None]) -> None:
    assert pair[5] is None
    one, two = ([r["train/loss"] for r in shop.rows(name) if "train/loss" in r] for name in ("alone", "pair16"))
    assert one == pytest.approx(two, abs=0.02)


def test_fp16_is_refused_on_a_cpu(alone: list[list[str] | None]) -> None:
    assert alone[2] == ["ConfigError", "pretrain.precision: 'fp16' needs a GPU (allowed on a CPU: bf16, fp32)"]


def test_a_loss_that_is_no_number_stops_the_run(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[3] is not None and alone[3][0] == "Diverged" and "try a lower pretrain.optimizer.lr" in alone[3][1]
    assert all(math.isfinite(r["train/loss"]) for r in shop.rows("diverged") if "train/loss" in r)


def test_updates_that_deepspeed_leaves_out_stop_the_run(shop: Workshop, pair: list[list[str] | None]) -> None:
    """Under ZeRO it makes none where a gradient is not finite, and says nothing: the loss stays where it is for ever."""
    assert pair[8] is not None and pair[8][0] == "Diverged"
    assert "loss or gradient has been no finite number for 3 steps in a row, and no update was made" in pair[8][1]


def test_weights_that_are_no_numbers_are_not_saved(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[4] is not None and alone[4][0] == "Diverged" and "no longer finite at step 1, which is not saved" in alone[4][1]
    assert Checkpoints(shop.directory("unseen")).steps() == []


def test_starting_from_a_step_of_another_run(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[5] is None and shop.rows("onward") == shop.rows("alone"), "all of its state, at that step"
    assert alone[6] is None
    (_, old), (card, new) = find_model(shop.directory("alone"), 3), find_model(shop.directory("finer"))
    assert card.pixels == 16 and old["pos_embed"].shape[1] < new["pos_embed"].shape[1]
    assert alone[7] == ["CheckpointError", "pretrain.start.from: there is no committed checkpoint in /elsewhere/run"]


@pytest.fixture(scope="module")
def resumed(shop: Workshop, alone: object, pair: object) -> list[list[str] | None]:
    """Two new processes go on from step 3 of each stage."""
    jobs = []
    for old, new, override in [
        *((f"stage{n}", f"again{n}", f"pretrain.zero.stage={n}") for n in range(4)),
        ("pair16", "again16", "pretrain.precision=bf16"),
    ]:
        _copy_run(shop, old, new)
        shutil.rmtree(shop.root / "runs" / new / "checkpoints" / "step-6")
        jobs.append(shop.job(new, override))
    _copy_run(shop, "rich2", "rich2again")
    shutil.rmtree(shop.root / "runs" / "rich2again" / "checkpoints" / "step-12")
    _flip(shop.root / "damaged" / "train-00001.tar")  # it is whole again
    _flip(next((shop.root / "runs" / "stage1" / "checkpoints" / "step-6").rglob("rank-00001-of-00002.safetensors")))
    for step in (3, 6):
        _flip(next((shop.root / "runs" / "child" / "checkpoints" / f"step-{step}").rglob("rank-00000-of-00002.safetensors")))
    return shop.train(
        2,
        [
            *jobs,
            shop.job("stage1", "pretrain.zero.stage=1"),  # its newest checkpoint is damaged now
            shop.job("child", f"pretrain.start={shop.root}/runs/alone@3"),  # both its checkpoints are damaged now
            rich(shop, "rich2again"),
        ],
    )


def _copy_run(shop: Workshop, old: str, new: str) -> None:
    shutil.copytree(shop.root / "runs" / old, shop.root / "runs" / new)
    record = shop.root / "runs" / new / "run.yaml"
    record.write_text(record.read_text().replace(f"name: {old}", f"name: {new}"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("number", "old", "new"), [*((n, f"stage{n}", f"again{n}") for n in range(4)), (4, "pair16", "again16")])
def test_a_resumed_run_is_the_unbroken_one(shop: Workshop, resumed: list[list[str] | None], number: int, old: str, new: str) -> None:
    """Exactly: every row, and every weight."""
    assert resumed[number] is None
    assert shop.rows(new) == shop.rows(old)
    one, two = find_model(shop.directory(old))[1], find_model(shop.directory(new))[1]
    assert all((one[k] == two[k]).all() for k in one)


def test_a_damaged_checkpoint_costs_its_steps_alone(shop: Workshop, resumed: list[list[str] | None]) -> None:
    assert resumed[5] is None
    assert shop.rows("stage1") == shop.rows("again1") and Checkpoints(shop.directory("stage1")).steps() == [3, 6]
    assert [n for n in shop.directory("stage1").names("checkpoints/step-6") if n.startswith("SET-ASIDE-")]


LAST = "pretrain.save.every=100 steps"  # the last step is saved, and none before


def whole(stage: int) -> str:
    return f"{{stage: {stage}}}"


# pretrain.zero of who goes on, and the run whose checkpoint it is; each stage of each number of ranks
TARGETS = {
    1: [(whole(0), "stage0"), (whole(1), "stage2"), (whole(2), "stage3"), (whole(3), "four"), (OFFLOAD, "alone")],
    2: [(whole(0), "alone"), (whole(1), "stage3"), (whole(2), "four"), (whole(3), "offload")],
    3: [(whole(0), "stage1"), (whole(1), "four"), (whole(2), "alone"), (whole(3), "stage2"), (OFFLOAD.replace("2", "3"), "stage3")],
    4: [(whole(0), "offload"), (whole(1), "stage1"), (whole(2), "stage2"), (whole(3), "three"), (OFFLOAD.replace("2", "1"), "stage3")],
}


@pytest.fixture(scope="module")
def moved(shop: Workshop, alone: object, pair: object, three: object) -> dict[int, list[list[str] | None]]:
    """Step 3 of a run, gone on from by another number of ranks at another stage."""
    errors = {}
    for ranks in (4, 1, 2, 3):  # four first: the others go on from one of its
        own = [shop.job("four", "pretrain.zero.stage=3")] if ranks == 4 else []
        jobs = [
            shop.job(f"to-{ranks}-{n}", f"pretrain.zero={zero}", f"pretrain.start={{from: {shop.root}/runs/{old}@3, load: all}}", LAST)
            for n, (zero, old) in enumerate(TARGETS[ranks])
        ]
        start16 = f"pretrain.start={{from: {shop.root}/runs/pair16@3, load: all}}"
        half = (
            [shop.job(f"half-{ranks}", "pretrain.precision=bf16", f"pretrain.zero.stage={ranks}", start16, LAST)] if ranks in (1, 3) else []
        )
        errors[ranks] = shop.train(ranks, [*own, *jobs, *half])
    return errors


@pytest.mark.parametrize(("ranks", "number"), [(ranks, number) for ranks, targets in TARGETS.items() for number in range(len(targets))])
def test_any_number_of_ranks_goes_on_at_any_stage(
    shop: Workshop, moved: dict[int, list[list[str] | None]], ranks: int, number: int
) -> None:
    assert not any(moved[ranks])
    assert close(shop.rows(f"to-{ranks}-{number}"), shop.rows("alone"), 1e-5)
    one, two = find_model(shop.directory("alone"))[1], find_model(shop.directory(f"to-{ranks}-{number}"))[1]
    assert set(one) == set(two) and max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4


@pytest.mark.parametrize("ranks", [1, 3])
def test_so_does_a_run_in_16_bits(shop: Workshop, moved: dict[int, list[list[str] | None]], ranks: int) -> None:
    one, two = ([r["train/loss"] for r in shop.rows(name) if "train/loss" in r] for name in ("pair16", f"half-{ranks}"))
    assert two[:3] == one[:3], "the history"
    assert two == pytest.approx(one, abs=0.02)


def test_a_child_without_a_sound_checkpoint_does_not_begin_from_nothing(shop: Workshop, resumed: list[list[str] | None]) -> None:
    assert resumed[6] is not None and resumed[6][0] == "CheckpointError"
    assert "all are damaged and set aside; with --fresh it begins again" in resumed[6][1]
    assert Checkpoints(shop.directory("child")).steps() == []


def loader_state(shop: Workshop, name: str, step: int) -> dict[str, Any]:
    state = next((shop.root / "runs" / name / "checkpoints" / f"step-{step}").glob("*/state.json"))
    return json.loads(state.read_text())["loader"]


def test_a_mixture_with_damage_and_all_augmentation_trains_the_same_on_two_ranks(
    shop: Workshop, alone: list[list[str] | None], pair: list[list[str] | None]
) -> None:
    assert alone[8] is None and pair[7] is None
    assert close(shop.rows("rich"), shop.rows("rich2"), 1e-5)
    for step in (6, 12):
        one, two = loader_state(shop, "rich", step), loader_state(shop, "rich2", step)
        assert one == two and one["consumed"] == 20 * step
    replaced = one["replaced"]
    assert len({r["key"] for r in replaced}) == 1 and {(r["shard"], r["reason"]) for r in replaced} == {("train-00001.tar", "checksum")}
    assert len(replaced) >= 2  # each view of it


def test_what_was_replaced_stays_replaced_on_resume(shop: Workshop, resumed: list[list[str] | None]) -> None:
    """The sample is sound again, yet what the ledger of step 6 holds is replayed; after it the sound sample is used."""
    assert resumed[7] is None
    known = loader_state(shop, "rich2", 6)["replaced"]
    after = [r for r in loader_state(shop, "rich2", 12)["replaced"] if r["position"] >= 120]
    assert loader_state(shop, "rich2again", 12)["replaced"] == known
    assert (shop.rows("rich2again") == shop.rows("rich2")) is (not after)


def test_nothing_was_compiled(shop: Workshop, alone: object, pair: object, three: object, resumed: object, moved: object) -> None:
    extensions = shop.root / "extensions"
    assert not extensions.exists() or not [p for p in extensions.rglob("*") if p.is_file()]
