"""What is wrong with a section `pretrain` in itself; touches nothing outside it."""

from __future__ import annotations

from torch import nn

from pipeline.config.pretrain import Pretrain
from pipeline.core.errors import ConfigError, choose
from pipeline.models import Model, build
from pipeline.models.blockwise import blocks_of
from pipeline.objectives import check_best, check_mixing
from pipeline.plan.plan import check_schedule
from pipeline.train.inputs import options_of
from pipeline.train.optim import OPTIMIZERS
from pipeline.train.schedule import SCHEDULES
from pipeline.train.scores import check_scores, wanted
from pipeline.train.settings import check_raw


def check_pretrain(p: Pretrain, has_many: bool) -> None:
    """Raises ConfigError. `has_many`: it trains on several datasets."""
    _check_blocks(p, build(p.model.name, options_of(p, classes=2), device="meta"))
    check_mixing(p.objective.name, p.image)
    if p.save.best:
        check_best(p.objective.name, p.save.best, wanted(p))
    check_scores(p, has_many)
    choose("pretrain.optimizer.name", p.optimizer.name, OPTIMIZERS)
    choose("pretrain.schedule.name", p.schedule.name, SCHEDULES)
    check_raw(p.deepspeed)
    check_schedule(p)


def _check_blocks(p: Pretrain, model: Model) -> None:
    """Raises ConfigError for what is done block by block of a model that has none."""
    for key in ("recompute", "compile"):
        if getattr(p, key) and not blocks_of(model):
            raise ConfigError(f"pretrain.{key}: is done to each Transformer block, and {p.model.name} has none (allowed: false)")
    if p.optimizer.layer_decay and sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:  # more than a patch embedding
        raise ConfigError(f"pretrain.optimizer.layer_decay: goes by Transformer blocks, {p.model.name} has convolutions (allowed: null)")
