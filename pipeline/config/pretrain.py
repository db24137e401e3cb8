"""The section `pretrain` of a config: the model, how it is trained and saved. What it sees is in `inputs.py`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from pipeline.config.inputs import Image, Loader, Palette, Text
from pipeline.config.section import Count, Decay, Flag, Fraction, Interval, Part, Positive, Section, Span, Time
from pipeline.config.validate import Validate
from pipeline.core import units


class _Named(Section):
    """Something by name, and the arguments its builder takes; null takes away one that an extended file gave."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class ModelSection(_Named):
    """A model by name: `python -m pipeline.models` lists them."""


class Objective(_Named):
    """What training minimises."""


class Start(Section):
    """Begin from another run's checkpoint, `URL` (its newest) or `URL@step`, or from a published model's weights: a directory or file in
    Hugging Face's, timm's, open_clip's, OpenAI's or Google's form."""

    _plain_key: str = "from"
    from_: str = Field(alias="from")
    load: Literal["weights", "all"] = "weights"


class Optimizer(Section):
    """Biases, gains and what the model names (tokens, positions) are not decayed."""

    name: str = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of adafactor: the momentum, and the largest decay of the second moment")
    eps: Positive = 1e-8
    momentum: Fraction = Field(0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    head_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="of the classifier; default: as all others'")
    undecayed: tuple[str, ...] = Field((), description="patterns of names of further parameters that weight decay leaves alone")
    layer_decay: Part | None = Field(None, description="each layer learns by this times the rate of the one above it")
    clip: Positive | None = Field(None, description="largest norm of the whole gradient")


class Average(Section):
    """A moving average of the parameters, kept beside them (Polyak averaging); a run that has one is evaluated and exported by it, with
    the last buffers (BatchNorm's statistics); validation while training looks at the parameters themselves."""

    decay: Decay = 0.9999


class Schedule(Section):
    """`rsqrt` goes on for ever, so it has a `cooldown` to end with."""

    name: str = "cosine"
    warmup: Span | None = None
    cooldown: Span | None = Field(None, description="of rsqrt: linear to zero over the last of the run")
    timescale: Span | None = Field(None, description="of rsqrt: after it the rate is 1 / sqrt 2 of its peak; default: 10000 steps")

    @model_validator(mode="after")
    def _only_rsqrt_goes_on(self) -> Schedule:
        for key in ("cooldown", "timescale"):
            if getattr(self, key) and self.name != "rsqrt":
                raise ValueError(f"{key}: is of the schedule rsqrt alone, and this is {self.name}")
        return self


AUTO = -1  # in place of a number that the plan is to choose (plan/fit.py), before the run is claimed: workers never see it


def _or_auto(value: object, least: int, most: float) -> int:
    """A whole number from `least` to `most`, or `auto`."""
    if value in ("auto", AUTO) and not isinstance(value, bool):
        return AUTO
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        allowed = "0, 1, 2 or 3" if most == 3 else f"a whole number of {least} or more"
        raise ValueError(f"should be {allowed}, or 'auto'")
    return number


_AUTO_WORD = PlainSerializer(lambda number: "auto" if number == AUTO else number)
MicroBatch = Annotated[
    int,
    BeforeValidator(lambda value: _or_auto(value, 1, math.inf)),
    _AUTO_WORD,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
Stage = Annotated[
    int,
    BeforeValidator(lambda value: _or_auto(value, 0, 3)),
    _AUTO_WORD,
    WithJsonSchema({"enum": [0, 1, 2, 3, "auto"]}),
]


class Zero(Section):
    """What the ranks share among them (Rajbhandari et al. 2020): nothing; the optimiser's state; gradients too; parameters too. `auto`:
    the smallest stage at which the plan fits the device."""

    _plain_key: str = "stage"
    stage: Stage = 0
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keeps the optimiser's state, and its step, in the host's memory; all: the parameters as well (stage 3)"
    )
    hpz: Count = Field(
        1,
        description="hierarchical partitioning of stage 3 (ZeRO++): so many neighbouring ranks, those of a node, hold all parameters too; "
        "divides every number of workers that cluster allows",
    )

    @model_validator(mode="after")
    def _offloads_what_is_shared(self) -> Zero:
        if self.offload != "none" and self.stage == 0:
            raise ValueError(f"offload: {self.offload!r} needs a stage of 1, 2 or 3")
        for key, is_given in (("offload: all", self.offload == "all"), (f"hpz: {self.hpz}", self.hpz > 1)):
            if is_given and self.stage != 3:
                raise ValueError(
                    f"{key}: needs stage 3, which shares the parameters; this is stage {'auto' if self.stage == AUTO else self.stage}"
                )
        return self


class Best(Section):
    """The checkpoint with the best of a validation metric."""

    _plain_key = "metric"

    metric: str = "validate/loss"
    is_higher_better: Flag = Field(False, alias="higher")


class Save(Section):
    """`every: auto` works the interval out from what a save costs and how often machines fail."""

    every: Interval | Literal["auto"] = units.Duration(10, "minute")
    keep: Count = Field(3, description="the newest checkpoints that stay")
    permanent: Span | None = Field(None, description="the first checkpoint at or after each of its multiples stays for ever")
    best: Best | None = Field(None, description="the best by a validation metric stays")
    retry: Time = Field(units.Duration(10, "minute"), description="how long an upload that fails is tried again")
    patience: Time = Field(units.Duration(2, "hour"), description="after so long without a checkpoint the run ends")
    notice: Time | None = Field(None, description="how long before it goes a machine is told to; a save must fit into it")

    @model_validator(mode="after")
    def _patience_outlasts_retry(self) -> Save:
        if self.patience.seconds < self.retry.seconds:
            raise ValueError(f"patience: {self.patience} is shorter than pretrain.save.retry, which is {self.retry}; give as much or more")
        return self


class Profile(Section):
    """A trace of a few steps by torch's profiler, in profile/ of the run directory."""

    steps: Count = 3
    after: Count = Field(10, description="steps of the job before the first that is traced: they are slower than those to come")
    ranks: Literal["first", "all"] = "first"


class Guard(Section):
    """What is done where training goes wrong. An update whose loss or gradient is no finite number is always left out, on all ranks."""

    skips: Count = Field(
        3, description="updates left out in a row, after which the run goes back to its last checkpoint, past the data since"
    )
    spike: Positive | None = Field(
        10.0,
        description="so many standard deviations (of the median absolute deviation) above the median of recent steps the loss is too high; "
        "so is the norm of the gradient by its logarithm, from ten times the usual one on at 10; null: they never are",
    )
    lasts: Count = Field(3, description="steps in a row with too high a loss, or norm, after which the run goes back in the same way")
    window: Annotated[int, Field(ge=10, le=10_000)] = Field(100, description="recent steps; nothing is too high before half of them")
    rewinds: Annotated[int, Field(ge=0)] = Field(
        2, description="how often it goes back without a checkpoint beyond the bad place, before the run ends as diverged"
    )
    check: Span | None = Field(
        units.Duration(1000, "step"),
        description="how often all ranks compare the parameters that each has a copy of; also before each save; null: never",
    )
    hang: Time | None = Field(
        units.Duration(90, "second"),
        description="a rank whose process does not run for so long has hung: after half of it all stacks are written, after it the run "
        "ends with exit code 33; one that runs and begins nothing new has four times as long in a step, 15 minutes more for input, 30 more "
        "in validation, and for each thing up to the end of a job's first step, which may compile, ten times as long and 15 minutes more; "
        "null: nobody watches. A start ends where workers have not joined the others after ten minutes, and saving after "
        "pretrain.save.patience",
    )
    lag: Annotated[float, Field(gt=1)] | None = Field(
        1.5,
        description="a rank that takes so many times as long by itself, without its time in collectives, as the median of the others is "
        "named; null: none is",
    )


class Pretrain(Section):
    model: ModelSection
    objective: Objective = Objective(name="classify")
    image: Image = Image()
    text: Text | None = None
    palette: Palette | None = None
    start: Start | None = None
    batch: Count = Field(256, description="global, in samples")
    micro_batch: MicroBatch = Field(
        64, description="one forward pass of one rank, in samples; auto: as many as fit, once for the whole run"
    )
    duration: Span
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    average: Average | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    recompute: Flag = Field(False, description="keep of each block its input alone, and compute it once more on the way back")
    compile: Flag = Field(False, description="have torch compile each block, at the first step")
    zero: Zero = Zero()
    deepspeed: dict[str, Any] = Field({}, description="further keys of DeepSpeed's own configuration, as they are")
    save: Save = Save()
    guard: Guard = Guard()
    # `validate` would hide a method that pydantic keeps for old code, so the field carries the name as an alias.
    validation: Validate | None = Field(None, alias="validate")
    log: Span = Field(units.Duration(10, "step"), description="how often metrics are recorded")
    statistics: Span | None = Field(
        None, description="how often norms of weights, gradients and updates are recorded by parameter; null: never"
    )
    peak: Positive | None = Field(
        None, description="TFLOP/s that one device could do, of which MFU tells the part made use of; default: known GPUs' in 16 bits"
    )
    profile: Profile | None = Field(None, description="`{}` traces steps 11 to 13 of each job")
    loader: Loader = Loader()
    split: str = "train"

    @model_validator(mode="after")
    def _batch_divides(self) -> Pretrain:
        if self.micro_batch != AUTO and self.batch % self.micro_batch:
            raise ValueError(f"batch: {self.batch} is not a multiple of micro_batch ({self.micro_batch})")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Pretrain:
        if self.save.best and not self.validation:
            raise ValueError(f"save.best: {self.save.best.metric} is measured by validation, and there is no section pretrain.validate")
        return self
