from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.core.errors import ConfigError, DataError
from pipeline.evaluate import check_evaluate
from pipeline.evaluate.tasks import find_tasks, slug


def changed(config: Config, **evaluate: Any) -> Config:
    values = config.model_dump(mode="json", by_alias=True)
    return parse_config({**values, "evaluate": {**values["evaluate"], **evaluate}})


def test_a_sound_config_passes(config: Config, dataset_url: str) -> None:
    check_evaluate(config)
    check_evaluate(changed(config, suites=[{"name": "own"}, {"name": "other", "data": dataset_url}]))


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"protocols": ["liner"]}, r"evaluate\.protocols\.0: 'liner' is not known, did you mean 'linear'"),
        (
            {"suites": [{"name": "a", "test": "tset"}]},
            r"evaluate\.suites\.0\.test: 'tset' is not known, did you mean 'test'.*allowed: test, train",
        ),
        ({"suites": [{"name": "a", "train": "val"}]}, r"evaluate\.suites\.0\.train: 'val'"),
        ({"suites": [{"name": "a", "test": "train"}]}, r"evaluate\.suites\.0\.test: 'train' is also"),
        ({"suites": [{"name": "a"}, {"name": "a"}]}, r"evaluate\.suites\.1\.name: 'a' is given twice"),
        ({"suites": ["vtab-1k"]}, r"evaluate\.suites\.0: the public suite 'vtab-1k'"),
        ({"fine_tune": {"pixels": 30}}, r"evaluate\.fine_tune\.pixels: 30 is not a multiple of the patch, 4"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(config: Config, evaluate: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_evaluate(changed(config, **evaluate))


def test_the_splits_of_a_dataset_that_is_there_are_looked_up(config: Config, dataset_url: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.suites\.0\.test: 'validation' is not known"):
        check_evaluate(changed(config, suites=[{"name": "other", "data": dataset_url, "test": "validation"}]))


def test_a_missing_dataset(config: Config, tmp_path: Any) -> None:
    nowhere = changed(config, suites=[{"name": "other", "data": str(tmp_path)}])
    with pytest.raises(DataError, match=r"evaluate\.suites\.0\.data: there is no dataset at"):
        check_evaluate(nowhere)
    with pytest.raises(DataError, match="there is no dataset at"):
        find_tasks(config, str(tmp_path))


def test_tasks_carry_classes_and_hash(config: Config, dataset_url: str) -> None:
    [task] = find_tasks(config, dataset_url)
    assert (task.name, task.url, task.classes) == ("colours", dataset_url, ["blue", "green", "red"])
    assert task.hash == task.open("train").manifest.hash


def test_slug() -> None:
    assert slug("vtab-1k/own-split") == "vtab-1k-own-split"
