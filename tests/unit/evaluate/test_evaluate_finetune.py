from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.checkpoint import ModelCard
from pipeline.config import Config
from pipeline.core.errors import CheckpointError, Diverged
from pipeline.evaluate.finetune import Outcome, Part, Settings, choose_lr, fine_tune, learning_rate, pass_size, prepare, sweep_lr
from pipeline.evaluate.tasks import Task
from pipeline.models.positions import resize_positions


@pytest.fixture
def settings(config: Config) -> Settings:
    assert config.evaluate and config.pretrain
    return Settings.of(config.evaluate.fine_tune, config.pretrain.image, 16, micro_batch=8)


def test_settings_enlarge_and_keep_the_patches_of_a_pass(settings: Settings) -> None:
    assert (settings.image.pixels, settings.image.enlarge, settings.image.crop) == (16, True, "none")
    assert settings.limit == 2


def test_prepare_interpolates_positions_and_zeroes_the_head(card: ModelCard, state: dict[str, torch.Tensor]) -> None:
    model = prepare(card, state, 16, classes=3)
    torch.testing.assert_close(model.pos_embed.detach(), resize_positions(state["pos_embed"], 4))
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.detach(), state["blocks.0.attn.qkv.weight"])  # type: ignore[union-attr]
    assert prepare(card, state, 16, classes=9).head.weight.shape == (9, 16)


def test_other_weights_are_refused(card: ModelCard, state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="a different model"):
        prepare(replace(card, options={**card.options, "width": 32}), state, 16, classes=3)


def test_learning_rate_warms_up_then_falls_to_nothing(settings: Settings) -> None:
    rates = [learning_rate(0.1, step, settings) for step in range(settings.steps)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(0.1, settings.steps, settings) == pytest.approx(0)


def test_pass_size() -> None:
    assert [pass_size(512, 100), pass_size(30, 7), pass_size(7, 3), pass_size(4, 9)] == [64, 6, 1, 4]


def test_part_visits_each_of_its_samples_once_an_epoch(task: Task) -> None:
    part = Part(task.open("train"), np.array([3, 5, 8, 9]), 0)
    assert sorted(part.samples(0, 4)) == [3, 5, 8, 9]
    assert sorted(part.samples(4, 4)) == [3, 5, 8, 9]
    assert part.epoch_of(5) == 1


def test_best_rate_is_the_lower_of_a_tie_and_never_a_diverged_one() -> None:
    outcomes = [Outcome(0.1, 5, 9, 0, 0), Outcome(0.01, 5, 9, 0, 0), Outcome(1, 9, 9, math.nan, 0, diverged=True)]
    assert choose_lr(outcomes) == 0.01


def test_fine_tuning_learns_and_repeats_itself(card: ModelCard, state: dict[str, torch.Tensor], task: Task, settings: Settings) -> None:
    settings = replace(settings, steps=40, limit=16)
    first, again = (fine_tune(card, state, task, settings, 0.05, seed=0) for _ in range(2))
    assert first.top1 > 0.6
    assert (first.correct, first.loss) == (again.correct, again.loss)
    assert first.n == len(task.open("test"))


def test_sweep_scores_on_the_held_out_tenth(card: ModelCard, state: dict[str, torch.Tensor], task: Task, settings: Settings) -> None:
    outcome = sweep_lr(card, state, task, settings, 0.01, seed=0)
    assert outcome.n == max(1, len(task.open("train")) // 10)
    assert not outcome.diverged


def test_a_rate_that_diverges_scores_nothing(card: ModelCard, state: dict[str, torch.Tensor], task: Task, settings: Settings) -> None:
    broken = {**state, "norm.bias": torch.full_like(state["norm.bias"], math.inf)}
    assert sweep_lr(card, broken, task, settings, 0.01, seed=0).diverged
    with pytest.raises(Diverged, match=r"evaluate\.fine_tune\.lr"):
        fine_tune(card, broken, task, settings, 0.01, seed=0)
