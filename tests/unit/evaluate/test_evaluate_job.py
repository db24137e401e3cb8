from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.config import Config, parse_config
from pipeline.core.errors import DataError, NoSuchRun
from pipeline.core.progress import Event
from pipeline.core.storage import Storage
from pipeline.evaluate import Task, read_results
from pipeline.evaluate.features import extract, load_model
from pipeline.evaluate.job import _news, evaluate, evaluate_model
from pipeline.evaluate.results import find_result, write_result
from pipeline.evaluate.supervised import evaluate_supervised, softmax
from pipeline.evaluate.wanted import hash_weights

State = dict[str, torch.Tensor]


def only(config: Config, protocols: list[str]) -> Config:
    values = config.model_dump(mode="json", by_alias=True)
    return parse_config({**values, "evaluate": {**values["evaluate"], "protocols": protocols}})


def test_everything_is_scored_kept_and_reused(config: Config, task: Task, card: ModelCard, state: State, tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write("evaluation/colours-old.json", b"{}")
    results, metrics = evaluate_model(config, run, [task], card, state)
    assert [r.name for r in results] == ["supervised", "linear", "few-shot/1", "few-shot/5", "fine-tune"]
    assert run.names("evaluation") == [f"colours-{n}.json" for n in ("few-shot-1", "few-shot-5", "fine-tune", "linear", "supervised")]
    assert read_results(run) == results
    assert {f"evaluate/colours/{n}/top1" for n in ("supervised", "linear", "few-shot-1", "few-shot-5", "fine-tune")} <= set(metrics)
    assert all(r.low <= r.value <= r.high for r in results)
    tuned = results[-1]
    assert (tuned.details["pixels"], len(tuned.values), len(tuned.details["sweep"])) == (16, 2, 2)
    assert tuned.details["lr"] in (0.01, 0.03)

    marked = replace(results[1], seconds=12345.0)  # what is there already is not worked out again
    write_result(run, marked)
    assert evaluate_model(config, run, [task], card, state)[0][1] == marked
    again, _ = evaluate_model(only(config, ["linear"]), run, [task], replace(card, step=8), state)
    assert len(again) == 1
    assert again[0].seconds != 12345.0
    assert run.names("evaluation") == ["colours-linear.json"], "scores of another checkpoint are gone"


def test_a_failing_task_does_not_stop_the_others(config: Config, task: Task, card: ModelCard, state: State, tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    lost = replace(task, name="lost", url=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="there is no dataset here"):
        evaluate_model(only(config, ["linear"]), run, [lost, task], card, state)
    assert [r.suite for r in read_results(run)] == ["colours"]


def test_supervised_is_left_out_of_other_classes(config: Config, task: Task, card: ModelCard, state: State, tmp_path: Path) -> None:
    other = replace(task, classes=["a", "b", "c"])
    assert evaluate_model(only(config, ["supervised"]), Storage(str(tmp_path)), [other], card, state) == ([], {})


def test_a_run_without_a_checkpoint(config: Config, dataset_url: str, tmp_path: Path) -> None:
    with pytest.raises(NoSuchRun):
        evaluate(config, Storage(str(tmp_path)), dataset_url)


def test_supervised_keeps_each_prediction(card: ModelCard, state: State, task: Task) -> None:
    result = evaluate_supervised(card, state, task, "f")
    kept = result.details["predictions"]
    test = task.open("test")
    assert kept["key"] == [test[n].key for n in range(len(test))]
    hits = [a == b for a, b in zip(kept["label"], kept["predicted"], strict=True)]
    assert result.value == pytest.approx(np.mean(hits))
    assert all(1 / 3 <= p <= 1 for p in kept["probability"])


def test_features_do_not_depend_on_the_batch(card: ModelCard, state: State, task: Task) -> None:
    model, test = load_model(card, state), task.open("test")
    whole, pieces = (extract(model.features, card, test, batch=b) for b in (64, 5))
    assert whole.values.shape == (len(test), 16)
    np.testing.assert_allclose(whole.values, pieces.values, atol=1e-5)
    some = extract(model.features, card, test, [4, 2])
    np.testing.assert_allclose(some.values, whole.values[[4, 2]], atol=1e-5)
    assert some.keys == [whole.keys[4], whole.keys[2]]


def test_softmax_of_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1000.0, 0.0]])), [[1, 0]])


def test_hash_of_weights_sees_a_single_value() -> None:
    a = {"w": np.zeros((2, 2), np.float32)}
    b = {"w": np.array([[0, 0], [0, 1e-9]], np.float32)}
    assert hash_weights(a) == hash_weights({"w": np.zeros((2, 2), np.float32)}) != hash_weights(b)


def test_a_damaged_result_counts_as_none(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write("evaluation/x.json", b"{}")
    assert find_result(run, "evaluation/x.json") is None
    assert read_results(run) == []


def test_news_tells_the_time_left() -> None:
    event = Event("loss 1", "seed 0", 120, 0, 480, "steps", 30.0)
    assert _news({"digits fine-tune seed 0": event}) == "digits fine-tune seed 0: 120/480 steps, 1 min 30 s left"
    assert _news({}) == ""
