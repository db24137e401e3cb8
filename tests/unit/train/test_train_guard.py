"""Bad batches: left out on all ranks, and passed over where they do not end. Real DeepSpeed on gloo, with an objective whose loss goes
wrong at known places (`spoilt.py`)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from workshop import Workshop, close

from pipeline.checkpoint import Checkpoints, Commit, find_model
from pipeline.checkpoint.goodput import read_jobs
from pipeline.config.pretrain import Guard as Section
from pipeline.core.errors import Diverged
from pipeline.core.storage import Storage
from pipeline.stream.__main__ import main as look
from pipeline.stream.ledger import Ledger, Skip
from pipeline.train.guard import Guard, Spikes, Trouble

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 18
BATCH = 20  # five micro-batches of four: global batch b has those from 5 b on


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Workshop:
    root = tmp_path_factory.mktemp("guard")
    make_dataset(Storage(str(root / "data")), {"train": 50, "test": 11})
    return Workshop(root)


def job(shop: Workshop, name: str, how: str, at: list[int], *overrides: str, guard: str = "{skips: 2}") -> dict[str, Any]:
    return shop.job(
        name, f"pretrain.duration={STEPS} steps", "pretrain.save={every: 6 steps, keep: 9}",
        f"pretrain.objective={{name: spoilt, how: {how}, at: {at}}}", f"pretrain.guard={guard}", *overrides,
    )  # fmt: skip


def pairs(shop: Workshop, name: str, *overrides: str) -> dict[str, Any]:
    """A loss of all pairs of the global batch, with one image that spoils it."""
    return shop.job(
        name, f"pretrain.model={CLIP_MODEL}", f"pretrain.objective={{name: spoilt-pairs, at: {ONE}}}", "pretrain.duration=4 steps",
        "pretrain.text={size: 520, length: 8}", "pretrain.save.every=4 steps", "pretrain.validate=null", *overrides,
    )  # fmt: skip


TOWER = "width: 16, depth: 1, heads: 2"
CLIP_MODEL = f"{{name: clip, embed: 8, vision: {{kind: vit, patch: 4, {TOWER}}}, text: {{kind: transformer, {TOWER}}}}}"
ONE = [11]  # of step 3
TWO = [31, 36]  # of steps 7 and 8
HIGH = list(range(35, 45))  # all of steps 8 and 9
STAGES = range(4)


@pytest.fixture(scope="module")
def alone(shop: Workshop) -> list[list[str] | None]:
    for_ever = list(range(30, 200))
    return shop.train(1, [
        job(shop, "one", "nan", ONE),
        job(shop, "two", "nan", TWO),
        job(shop, "high", "high", HIGH, guard="{window: 10, lasts: 2}"),
        job(shop, "odd", "high", HIGH[:5], guard="{window: 10, lasts: 2}"),
        job(shop, "for-ever", "nan", for_ever, "pretrain.save.every=3 steps", "pretrain.objective.pause=0.15"),
        job(shop, "at-once", "nan", list(range(200))),
        job(shop, "never-back", "nan", for_ever, guard="{skips: 2, rewinds: 0}"),
        job(shop, "inf", "inf", ONE),
        job(shop, "gradient", "gradient", ONE),
        job(shop, "bf16", "gradient", ONE, "pretrain.precision=bf16"),
        job(shop, "steep", "steep", HIGH, guard="{window: 10, lasts: 2}"),
        pairs(shop, "pairs"),
        job(shop, "heavy", "nan", [], "pretrain.optimizer={name: sgd, lr: 1e+30, weight_decay: 1e+12}", "pretrain.save.every=1 step"),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def pair(shop: Workshop) -> list[list[str] | None]:
    both = [("one", ONE, "nan"), ("two", TWO, "nan"), ("gradient", ONE, "gradient")]
    jobs = [job(shop, f"{name}-{n}", how, at, f"pretrain.zero.stage={n}") for name, at, how in both for n in STAGES]
    half = [job(shop, f"half-{n}", "gradient", ONE, "pretrain.precision=bf16", f"pretrain.zero.stage={n}") for n in STAGES]
    offload = job(shop, "two-offload", "nan", TWO, "pretrain.zero={stage: 2, offload: optimizer}")
    return shop.train(
        2,
        [
            *jobs, *half, offload, job(shop, "high-2", "high", HIGH, "pretrain.zero.stage=2", guard="{window: 10, lasts: 2}"),
            job(shop, "steep-2", "steep", HIGH, "pretrain.zero.stage=2", guard="{window: 10, lasts: 2}"),
            pairs(shop, "pairs-2", "pretrain.zero.stage=3"),
        ],
    )  # fmt: skip


def loader_state(shop: Workshop, name: str, step: int = STEPS) -> dict[str, Any]:
    state = next((shop.root / "runs" / name / "checkpoints" / f"step-{step}").glob("*/state.json"))
    return json.loads(state.read_text())["loader"]


def losses(shop: Workshop, name: str) -> dict[int, float]:
    return {int(r["step"]): r["train/loss"] for r in shop.rows(name) if "train/loss" in r}


def moments(shop: Workshop, name: str) -> float:
    state = next((shop.root / "runs" / name / "checkpoints" / f"step-{STEPS}").glob("*/state.json"))
    return json.loads(state.read_text())["engine"]["optimizer"]["step"]


def test_one_bad_batch_is_left_out_and_named(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[0] is None
    assert sorted(losses(shop, "one")) == [1, 2, *range(4, STEPS + 1)], "its loss is no number to plot"
    assert moments(shop, "one") == STEPS - 1, "the optimiser made one step fewer"
    state = loader_state(shop, "one")
    [skip] = state["skipped"]
    assert (skip["first"], skip["last"], skip["step"], skip["is_passed"]) == (40, 60, 3, False) and skip["suspects"] == [[44, 48]]
    assert len(skip["keys"]) == 4 and skip["reason"] == "its loss is no finite number" and state["consumed"] == STEPS * BATCH
    told = [r for r in shop.rows("one") if "guard/skipped_steps" in r]
    assert [(r["step"], r["guard/skipped_steps"], r["guard/rewinds"]) for r in told] == [(3, 1, 0)]
    done = CliRunner().invoke(look, ["--run", str(shop.root / "runs/one"), "--skipped", "--step", "3", "--json"])
    found = json.loads(done.stdout)
    assert "update of step 3 was left out (its loss is no finite number; at positions 44 to 47)" in found["step"]["notes"][0]
    assert [row["key"] for row in found["step"]["samples"]][4:8] == skip["keys"] == found["skipped"][0]["keys"]


@pytest.mark.parametrize(("number", "name", "reason"), [(7, "inf", "loss"), (8, "gradient", "gradient"), (9, "bf16", "gradient")])
def test_so_is_one_whose_loss_is_infinite_or_whose_gradient_alone_is(
    shop: Workshop, alone: list[list[str] | None], number: int, name: str, reason: str
) -> None:
    assert alone[number] is None
    [skip] = loader_state(shop, name)["skipped"]
    assert skip["reason"] == f"its {reason} is no finite number" and skip["step"] == 3 and moments(shop, name) == STEPS - 1
    assert all(w.isfinite().all() for w in find_model(shop.directory(name))[1].values())
    if name == "inf":  # nothing else of the batch counts
        assert losses(shop, "inf") == losses(shop, "one")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["one", "two", "gradient"])
def test_two_ranks_do_the_same_at_every_stage(
    shop: Workshop, alone: list[list[str] | None], pair: list[list[str] | None], name: str, stage: int
) -> None:
    assert not any(pair)
    two = f"{name}-{stage}"
    assert close(shop.rows(two), shop.rows(name), 1e-5)
    assert loader_state(shop, two) == loader_state(shop, name) and moments(shop, two) == moments(shop, name)


@pytest.mark.parametrize("stage", STAGES)
def test_in_16_bits_too(shop: Workshop, pair: list[list[str] | None], stage: int) -> None:
    [skip] = loader_state(shop, f"half-{stage}")["skipped"]
    assert (skip["step"], skip["reason"]) == (3, "its gradient is no finite number") and moments(shop, f"half-{stage}") == STEPS - 1
    assert all(w.isfinite().all() for w in find_model(shop.directory(f"half-{stage}"))[1].values())


def test_some_in_a_row_send_it_back_and_past_them(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[1] is None
    state = loader_state(shop, "two")
    passed = next(s for s in state["skipped"] if s["is_passed"])
    assert (passed["first"], passed["last"], passed["step"]) == (120, 160, 8), "from the checkpoint of step 6 to the end of step 8"
    assert "no finite number for 2 steps in a row, and no update was made" in passed["reason"]
    assert [(s["step"], s["first"]) for s in state["skipped"] if not s["is_passed"]] == [(7, 120), (8, 140)], "the bad ones stay known"
    assert state["consumed"] == (STEPS + 2) * BATCH and Checkpoints(shop.directory("two")).read(STEPS).samples == STEPS * BATCH
    rows = [r for r in shop.rows("two") if "train/loss" in r]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1)), "no step is there twice"
    assert [r["samples"] for r in rows] == [n * BATCH for n in range(1, STEPS + 1)] and moments(shop, "two") == STEPS
    told = [r for r in shop.rows("two") if "guard/skipped_steps" in r]
    assert [(r["step"], r["guard/skipped_steps"], r["guard/rewinds"]) for r in told] == [(6, 2, 1)]
    [record] = read_jobs(shop.directory("two"))
    assert record.lost > 0 and record.end == "finished" and [step for step, _ in record.commits][-1] == STEPS


def test_a_step_after_that_is_found_where_it_was(shop: Workshop, alone: list[list[str] | None]) -> None:
    """Step 7 took the batch that step 9 would have taken."""
    found = [
        json.loads(CliRunner().invoke(look, ["--run", str(shop.root / f"runs/{name}"), "--step", str(step), "--json"]).stdout)["step"]
        for name, step in (("one", 9), ("two", 7), ("two", 12), ("two", 6))
    ]
    assert [f["start"] for f in found] == [160, 160, 260, 100]
    assert [r["key"] for r in found[0]["samples"]] == [r["key"] for r in found[1]["samples"]]
    assert "positions 120 to 159 were passed over, 40 samples" in found[1]["notes"][0] and not found[2]["notes"]


def test_a_loss_that_stays_too_high_sends_it_back_too(shop: Workshop, alone: list[list[str] | None], pair: list[list[str] | None]) -> None:
    assert alone[2] is None
    [passed] = loader_state(shop, "high")["skipped"]
    assert passed["is_passed"] and (passed["first"], passed["last"], passed["step"]) == (120, 200, 10)
    assert "has been above" in passed["reason"] and "for 2 steps in a row" in passed["reason"]
    assert max(losses(shop, "high").values()) < 10 and sorted(losses(shop, "high")) == list(range(1, STEPS + 1))
    assert close(shop.rows("high-2"), shop.rows("high"), 1e-5) and loader_state(shop, "high-2")["skipped"][0]["last"] == 200


def test_so_does_a_gradient_that_stays_too_large(shop: Workshop, alone: list[list[str] | None], pair: list[list[str] | None]) -> None:
    """The loss is as it was."""
    assert alone[10] is None
    for name in ("steep", "steep-2"):
        [passed] = loader_state(shop, name)["skipped"]
        assert passed["is_passed"] and (passed["first"], passed["last"], passed["step"]) == (120, 200, 10)
        assert "the norm of the gradient has been above" in passed["reason"] and "for 2 steps in a row" in passed["reason"]
    assert close(shop.rows("steep-2"), shop.rows("steep"), 1e-5) and max(losses(shop, "steep").values()) < 2


@pytest.mark.parametrize("name", ["pairs", "pairs-2"])
def test_of_a_loss_of_all_together_only_those_that_spoilt_it_are_named(
    shop: Workshop, alone: list[list[str] | None], pair: list[list[str] | None], name: str
) -> None:
    assert alone[11] is None and not any(pair)
    [skip] = loader_state(shop, name, 4)["skipped"]
    assert (skip["step"], skip["reason"]) == (3, "its loss is no finite number")
    assert skip["suspects"] == [[45, 46]] and len(skip["keys"]) == 1, "the second of the second micro-batch"


def test_one_odd_batch_does_not(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[3] is None and loader_state(shop, "odd")["skipped"] == [] and losses(shop, "odd")[8] > 20


def test_what_does_not_help_ends(shop: Workshop, alone: list[list[str] | None]) -> None:
    assert alone[4] is not None and alone[4][0] == "Diverged"
    assert "training had gone back 2 times already; try a lower pretrain.optimizer.lr" in alone[4][1]
    assert Checkpoints(shop.directory("for-ever")).steps() == [3], "the second time it went back further"
    aside = [n for n in shop.directory("for-ever").names("checkpoints/step-6") if n.startswith("SET-ASIDE-")]
    assert len(aside) == 1
    assert alone[5] is not None and "there is no checkpoint yet to go back to" in alone[5][1]
    assert Checkpoints(shop.directory("at-once")).steps() == [], "nothing is saved while it goes wrong"
    assert alone[6] is not None and "training was not to go back (pretrain.guard.rewinds)" in alone[6][1]


def test_weights_that_are_no_numbers_send_it_back(shop: Workshop, alone: list[list[str] | None]) -> None:
    """A finite gradient can have such a step; there is no checkpoint before the first."""
    assert alone[-1] is not None and alone[-1][0] == "Diverged"
    assert Checkpoints(shop.directory("heavy")).steps() == []


@pytest.fixture(scope="module")
def resumed(shop: Workshop, alone: object, pair: object) -> list[list[str] | None]:
    """Killed after it went back: with the checkpoint that it went back to as the newest, and with one after it; on two ranks and on one."""
    jobs = []
    for old, new, newest in [("two", "two-again", 6), ("two", "two-later", 12), ("high", "high-again", 6), ("two-3", "two-back", 6)]:
        shutil.copytree(shop.root / "runs" / old, shop.root / "runs" / new)
        record = shop.root / "runs" / new / "run.yaml"
        record.write_text(record.read_text().replace(f"name: {old}\n", f"name: {new}\n"))
        for step in range(newest + 6, STEPS + 1, 6):
            shutil.rmtree(shop.root / "runs" / new / "checkpoints" / f"step-{step}")
        at, how, guard = (HIGH, "high", "{window: 10, lasts: 2}") if old == "high" else (TWO, "nan", "{skips: 2}")
        jobs.append(job(shop, new, how, at, f"pretrain.zero.stage={3 if old == 'two-3' else 1}", guard=guard))
    return shop.train(2, jobs)


@pytest.mark.parametrize(("old", "new"), [("two", "two-again"), ("two", "two-later"), ("high", "high-again"), ("two-3", "two-back")])
def test_a_run_that_went_back_is_resumed_as_any(shop: Workshop, resumed: list[list[str] | None], old: str, new: str) -> None:
    assert not any(resumed)
    assert close(shop.rows(new), shop.rows(old), 1e-5)
    assert loader_state(shop, new) == loader_state(shop, old)
    one, two = find_model(shop.directory(old))[1], find_model(shop.directory(new))[1]
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < (1e-3 if old != "two-3" else 1e-12)  # the latter on as many ranks


# Numbers alone


def curve(kind: str, steps: int, seed: int) -> np.ndarray:
    """Losses of a healthy training, by the shapes that these have."""
    random, t = np.random.default_rng(seed), np.arange(steps)
    match kind:
        case "classes":  # a zero head begins at ln(classes), exactly; noise of small batches
            return np.where(t == 0, math.log(1000), 2 + 4.9 * np.exp(-t / 300) + random.normal(0, 0.25, steps))
        case "plateau":  # long nothing, then a fall: contrastive training at a batch of 32,768
            return math.log(32768) - 7 / (1 + np.exp(-(t - 400) / 30)) + random.normal(0, 0.005, steps)
        case "pixels":  # hardly any noise
            return 2.1 + 4.1 * np.exp(-t / 50) + random.normal(0, 0.003, steps)
        case "warm-up":  # rises a little as the rate does, then falls
            return (
                6.9
                + 0.3 * np.exp(-(((t - 100) / 40) ** 2))
                - 3 * (1 - np.exp(-np.maximum(0, t - 150) / 200))
                + random.normal(0, 0.05, steps)
            )
        case "mixup":
            return 4 + 2.9 * np.exp(-t / 200) + random.uniform(-1, 1, steps)
        case "learnt":  # nearly all right, a hard sample now and then
            hard = (random.random(steps) < 0.05) * random.exponential(0.1, steps)
            return 2.3 * np.exp(-t / 20) + np.exp(random.normal(-6, 1, steps)) + hard
    raise AssertionError(kind)


KINDS = ["classes", "plateau", "pixels", "warm-up", "mixup", "learnt"]


def judge(losses: np.ndarray, guard: Guard | None = None) -> int | None:
    """The step, from 0, at which training would go back."""
    guard = guard or Guard(Section())
    for step, loss in enumerate(losses.tolist()):
        try:
            guard.judge(loss, False, False)
        except Trouble:
            return step
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_no_healthy_curve_is_taken_for_a_bad_one(kind: str) -> None:
    assert [judge(curve(kind, 1000, seed)) for seed in range(10)] == [None] * 10


def norms(kind: str, seed: int) -> np.ndarray:
    """Of the gradient, in healthy trainings."""
    random, t = np.random.default_rng(seed), np.arange(1000)
    match kind:
        case "falls":  # with the noise of small batches
            return (0.3 + 5 * np.exp(-t / 100)) * np.exp(random.normal(0, 0.4, 1000))
        case "plateau":  # and then it begins to learn: eightfold within 60 steps
            return 0.1 * (1 + 7 / (1 + np.exp(-(t - 400) / 10))) * np.exp(random.normal(0, 0.1, 1000))
        case "zero-head":  # a head that begins at zero lets nothing through
            return np.where(t == 0, 0.0, 0.02 + 2 * (1 - np.exp(-t / 150))) * np.exp(random.normal(0, 0.2, 1000))
        case "odd":  # a batch now and then
            return np.exp(random.normal(0, 0.1, 1000)) * np.where(random.random(1000) < 0.02, 100, 1)
    raise AssertionError(kind)


def steep(values: np.ndarray) -> int | None:
    """The step, from 0, at which training would go back for these norms alone."""
    guard = Guard(Section())
    for step, norm in enumerate(values.tolist()):
        try:
            guard.judge(1.0, False, False, norm)
        except Trouble as e:
            assert "norm of the gradient" in str(e)
            return step
    return None


@pytest.mark.parametrize("kind", ["falls", "plateau", "zero-head", "odd"])
def test_no_healthy_norm_is_taken_for_a_bad_one(kind: str) -> None:
    assert [steep(norms(kind, seed)) for seed in range(10)] == [None] * 10


@pytest.mark.parametrize("kind", ["falls", "plateau", "zero-head"])
def test_an_explosion_is_found_at_once(kind: str) -> None:
    for seed in range(5):
        values = norms(kind, seed)
        values[700:] *= 1000
        assert steep(values) == 702
        guard = Guard(Section())
        with pytest.raises(Trouble):
            for step, norm in enumerate(values.tolist()):
                guard = Guard(Section(), json.loads(json.dumps(guard.state()))) if step == 701 else guard  # as of a checkpoint
                guard.judge(1.0, False, False, norm)
        assert step == 702


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_found_at_once(kind: str) -> None:
    for seed in range(5):
        losses = curve(kind, 1000, seed)
        losses[700:] += max(losses[690:700].mean(), 1.0) * 3
        assert judge(losses) == 702


def test_a_rise_that_is_slow_is_left_to_people() -> None:
    assert judge(curve("classes", 1000, 0) + np.linspace(0, 3, 1000)) is None


def test_no_judgement_without_a_past() -> None:
    spikes = Spikes(10, 100)
    assert not any(spikes.is_high(loss) for loss in [1.0, 1e6, 1.0] + [1.0] * 46) and spikes.limit() == math.inf
    assert not spikes.is_high(1.0) and spikes.limit() == pytest.approx(1.2), "a plateau's least deviation is 2% of it"
    assert spikes.is_high(1.3) and not Spikes(None, 100, [1.0] * 60).is_high(1e9)


@pytest.fixture(scope="module")
def healthy(shop: Workshop) -> list[list[str] | None]:
    """Whole trainings with the guard as it is by default: a usual one, and one at ten times the rate without a warm-up."""
    whole = ["pretrain.duration=160 steps", "pretrain.save.every=80 steps", "pretrain.validate=null"]
    rash = ["pretrain.optimizer={lr: 0.05, clip: 1.0}", "pretrain.schedule=constant"]
    return shop.train(1, [shop.job("usual", *whole), shop.job("rash", *whole, *rash)])


@pytest.mark.parametrize(("number", "name"), [(0, "usual"), (1, "rash")])
def test_no_healthy_training_is_taken_for_a_bad_one(shop: Workshop, healthy: list[list[str] | None], number: int, name: str) -> None:
    assert healthy[number] is None
    rows = shop.rows(name)
    assert len(rows) == 160 and not any("guard/rewinds" in row for row in rows)
    real = np.array([loss for _, loss in sorted(losses(shop, name).items())])
    for window in (10, 30, 100):  # others would not have been either
        assert judge(real, Guard(Section(window=window))) is None
    real[120:] += 2 * math.log(3)  # three classes
    assert judge(real) == 122


def test_a_state_decides_as_the_unbroken_one() -> None:
    losses = curve("mixup", 400, 3)
    losses[302:] += 20
    whole, cut = Guard(Section()), Guard(Section())
    at = judge(losses, whole)
    for loss in losses[:303].tolist():
        cut.judge(loss, False, False)
    again = Guard(Section(), json.loads(json.dumps(cut.state())))
    assert at == 304 and judge(losses[303:], again) == 1


def test_fp16_looks_for_its_scale() -> None:
    guard = Guard(Section(skips=1))
    for _ in range(99):
        guard.judge(1.0, False, True)
    assert guard.is_sound
    with pytest.raises(Trouble, match="at any scale of fp16 for 100 steps in a row"):
        guard.judge(1.0, False, True)


def commit(step: int) -> Commit:
    return Commit(step, step, 1, f"g1-{step}", 1, 0, "view", "config", [])


def test_tries_are_counted_until_a_checkpoint_is_beyond_the_place() -> None:
    guard = Guard(Section(rewinds=2))
    commits = [commit(10), commit(20)]
    chosen = guard.choose(commits, 25, "it was bad")
    guard.went_back(chosen.step, {})
    assert (chosen.step, guard.tries, guard.place) == (20, 1, 25)
    commits.append(commit(30))
    chosen = guard.choose(commits, 33, "it was bad")
    guard.went_back(chosen.step, {})
    assert (chosen.step, guard.tries) == (30, 1), "beyond step 25"
    chosen = guard.choose(commits, 32, "it was bad")
    guard.went_back(chosen.step, {})
    assert (chosen.step, guard.tries, guard.place, guard.rewinds) == (20, 2, 33, 3), "one further back, as that did not help"
    with pytest.raises(Diverged, match="at step 21 it was bad, and training had gone back 2 times already"):
        guard.choose(commits[:2], 21, "it was bad")
    assert Diverged("").exit_code == 65


def test_positions_of_steps() -> None:
    ledger = Ledger()
    assert ledger.position(100) == 100 and ledger.passed(1000) == 0
    ledger.skip(Skip(40, 60, 3, "left out"))
    ledger.skip(Skip(60, 100, 5, "back", is_passed=True))
    ledger.skip(Skip(140, 160, 6, "back", is_passed=True))
    assert [ledger.position(n) for n in (0, 40, 60, 80, 100, 120)] == [0, 40, 100, 120, 160, 180]
    assert [n - ledger.passed(n) for n in (40, 60, 100, 140, 160, 200)] == [40, 60, 60, 100, 100, 140]
    ledger.skip(Skip(60, 200, 7, "further back", is_passed=True))
    assert [(s.first, s.last) for s in ledger.skips] == [(40, 60), (60, 200)] and ledger.position(60) == 200
    again = Ledger.from_values(json.loads(json.dumps(ledger.as_values())), 1.0, json.loads(json.dumps(ledger.skips_as_values())))
    assert again.skips == ledger.skips
