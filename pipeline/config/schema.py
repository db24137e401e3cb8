"""The typed, frozen form of a config.

Names of models, objectives, optimisers, protocols and the like are plain strings here: the rooms that own them check
them against their registries before anything starts, so that a new model needs no change in this file.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from pipeline.config.section import Bytes, Count, Decay, Flag, Fraction, Interval, Part, Positive, Quantity, Section, Span, Time
from pipeline.core import units


class StorageSection(Section):
    """Where runs are kept: a URL, or a URL with the endpoint of an S3-compatible store."""

    _plain_key: str = "url"
    url: str
    endpoint: str | None = None
    conditional: Flag = Field(
        True, description="false accepts a store that overwrites where it was asked not to: two jobs may then collide"
    )


class Tracking(Section):
    """The MLflow server. Default for file storage: SQLite and artifacts in it; other storage needs a uri."""

    uri: str | None = None
    experiment: str = "tessera"


class Cluster(Section):
    """`local`, or a Ray cluster; without an address RAY_ADDRESS is used."""

    name: str = "ray"
    address: str | None = None
    workers: Count | None = Field(None, description="training processes; default: one a GPU, or two where there is none")
    gpus: Annotated[int, Field(ge=0)] | None = None
    min_gpus: Annotated[int, Field(ge=0)] | None = None
    min_workers: Count | None = Field(None, description="go on with fewer workers than asked for, down to so many, while machines are gone")
    retries: Annotated[int, Field(ge=0)] = Field(3, description="restarts of a failed group of workers, in a row without a new checkpoint")
    wait: Time = Field(units.Duration(10, "minute"), description="how long to wait, after a failure, for machines to come back")
    price: Positive | None = Field(None, description="money an hour of one worker (a GPU, or a worker on CPUs), for the goodput ledger")
    currency: str = Field("USD", description="of the price: a word for it")
    python: str = Field("python", description="the interpreter on the cluster's machines")
    env: list[str] = Field([], description="names of environment variables that the job gets from the submitter, such as keys of the store")

    @property
    def is_local(self) -> bool:
        return self.name == "local"

    @model_validator(mode="after")
    def _least_is_no_more(self) -> Cluster:
        if self.min_gpus is not None and self.gpus is None:
            raise ValueError(f"min_gpus: {self.min_gpus} is the least of cluster.gpus, which is not given")
        pairs = [("min_gpus", "gpus", ""), ("min_workers", "workers", "")]
        if self.gpus:
            pairs += [("min_workers", "gpus", ", and each worker has one"), ("min_gpus", "workers", ", and each has one GPU")]
        for least, most, why in pairs:
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least}: {low} is the least of cluster.{most}, which is {high}{why}")
        return self


class Source(Section):
    """Where images come from. `folder`: a class a sub-folder, or one flat folder; side files .txt, .cls, .json."""

    format: str = "folder"
    url: str
    columns: dict[str, str] = {}


class Resize(Section):
    side: Literal["shorter", "longer"] = "shorter"
    pixels: Count
    enlarge: Flag = False


class ShardImages(Section):
    resize: Resize | None = None
    min_pixels: Count = Field(1, description="the shorter side of a smaller image makes it `too-small`")
    max_pixels: Count = Field(2**26, description="width x height of a larger image makes it `too-large`, before it is decoded")


class Shard(Section):
    source: Source
    splits: dict[str, Part] = {"train": 1.0}
    workers: Count | None = Field(None, description="parallel tasks; never changes the result; default: one a core")
    images: ShardImages = ShardImages()
    size: Bytes = 256 * 2**20

    @field_validator("splits")
    @classmethod
    def _splits_add_up(cls, splits: dict[str, float]) -> dict[str, float]:
        if abs(sum(splits.values()) - 1) > 1e-6:
            raise ValueError(f"the fractions must add up to 1, these add up to {sum(splits.values()):g}")
        for name in splits:
            _check_word(name)
        return splits


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


class RandAugment(Section):
    """arXiv 1909.13719: `ops` random operations an image, of a strength around `magnitude` (0 to 10)."""

    ops: Count = 2
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9
    deviation: Annotated[float, Field(ge=0)] = Field(0.5, description="standard deviation of the magnitude, as DeiT has it")


class Image(Section):
    """From a sample's image to the model's input; what is 0 or null is off."""

    pixels: Count = 224
    crop: Literal["random-resized", "random-square", "none"] = "random-resized"
    scale: tuple[Part, Part] = Field((0.08, 1.0), description="area kept by random-resized, as fractions")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="aspect ratios of random-resized")
    flip: Flag = True
    color_jitter: Annotated[float, Field(ge=0, le=1)] = Field(0, description="brightness, contrast and saturation within 1 +- this")
    rand_augment: RandAugment | None = None
    erase: Fraction = Field(0, description="probability of random erasing, with noise")
    mixup: Annotated[float, Field(ge=0)] = Field(0, description="alpha of mixup's Beta distribution")
    cutmix: Annotated[float, Field(ge=0)] = Field(0, description="alpha of CutMix's; with mixup too, one of them by the toss of a coin")
    repeats: Count = Field(1, description="repeated augmentation: views of a sample in a row; an epoch still counts N views of N samples")
    enlarge: Flag = Field(False, description="accept images smaller than `pixels`")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)

    @field_validator("scale", "ratio")
    @classmethod
    def _smaller_first(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] > ends[1]:
            raise ValueError("must give the smaller number first")
        return ends


class Text(Section):
    """From a sample's caption to tokens."""

    _plain_key: str = "tokenizer"
    tokenizer: str | None = Field(
        None,
        description="a tokenizer.json that `python -m pipeline.stream.text` made, or OpenAI's vocabulary (.txt.gz); "
        "default: the run learns one from its captions",
    )
    sha256: str | None = Field(None, description="of that file; what differs is refused")
    size: Count = Field(49408, description="tokens, at most, where the run learns them")
    length: Annotated[int, Field(ge=3)] = Field(77, description="tokens a caption, the first and last marks included")


class Palette(Section):
    """From pixels to colour numbers, for models of pixels."""

    _plain_key: str = "url"
    url: str | None = Field(
        None,
        description="a .npy that `python -m pipeline.stream.palette` made, OpenAI's clusters, or `three-bit`; "
        "default: the run learns one from its images",
    )
    sha256: str | None = Field(None, description="of that file; what differs is refused")
    colors: Annotated[int, Field(ge=2, le=2**15)] = Field(512, description="how many, where the run learns them")


class Cache(Section):
    """Where a machine keeps what it fetched of remote datasets; all its processes share it."""

    _plain_key: str = "path"
    path: str | None = Field(None, description="default: tessera-cache-<user> in the temporary directory")
    size: Bytes = 20 * 2**30


class Loader(Section):
    """How samples are read. Only `block` changes what a batch holds."""

    workers: Annotated[int, Field(ge=0)] = Field(1, description="decoding threads of a rank; 0 decodes in line")
    block: Count | None = Field(None, description="neighbouring samples read together; default: 1 on local disks, else 64")
    bad: Fraction = Field(0.01, description="the run stops where a larger fraction of samples had to be replaced")
    cache: Cache = Cache()


class Start(Section):
    """Begin from another run's checkpoint, `URL` (its newest) or `URL@step`, or from a published model's weights: a directory or file in
    Hugging Face's, timm's, open_clip's, OpenAI's or Google's form."""

    _plain_key: str = "from"
    from_: str = Field(alias="from")
    load: Literal["weights", "all"] = "weights"


class Optimizer(Section):
    name: str = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = Field(None, description="largest norm of the whole gradient")


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


class Zero(Section):
    """What the ranks share among them (Rajbhandari et al. 2020): nothing; the optimiser's state; gradients too; parameters too."""

    stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer"] = Field("none", description="keeps the optimiser's state, and its step, in the host's memory")

    @model_validator(mode="after")
    def _offloads_what_is_shared(self) -> Zero:
        if self.offload != "none" and self.stage == 0:
            raise ValueError(f"offload: {self.offload!r} needs a stage of 1, 2 or 3")
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
    permanent: Span | None = Field(None, description="checkpoints at its multiples stay for ever")
    best: Best | None = Field(None, description="the best by a validation metric stays")
    retry: Time = Field(units.Duration(10, "minute"), description="how long an upload that fails is tried again")
    patience: Time = Field(units.Duration(2, "hour"), description="after so long without a checkpoint the run ends")
    notice: Time | None = Field(None, description="how long before it goes a machine is told to; a save must fit into it")

    @model_validator(mode="after")
    def _patience_outlasts_retry(self) -> Save:
        if self.patience.seconds < self.retry.seconds:
            raise ValueError(f"patience: {self.patience} is shorter than pretrain.save.retry, which is {self.retry}; give as much or more")
        return self


class Validate(Section):
    every: Span = units.Duration(1, "epoch")
    split: str = "test"


class Pretrain(Section):
    model: ModelSection
    objective: Objective = Objective(name="classify")
    image: Image = Image()
    text: Text | None = None
    palette: Palette | None = None
    start: Start | None = None
    batch: Count = Field(256, description="global, in samples")
    micro_batch: Count = Field(64, description="one forward pass of one rank, in samples")
    duration: Span
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero: Zero = Zero()
    save: Save = Save()
    # `validate` would hide a method that pydantic keeps for old code, so the field carries the name as an alias.
    validation: Validate | None = Field(None, alias="validate")
    log: Span = Field(units.Duration(10, "step"), description="how often metrics are recorded")
    loader: Loader = Loader()
    split: str = "train"

    @model_validator(mode="after")
    def _batch_divides(self) -> Pretrain:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch: {self.batch} is not a multiple of micro_batch ({self.micro_batch})")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Pretrain:
        if self.save.best and not self.validation:
            raise ValueError(f"save.best: {self.save.best.metric} is measured by validation, and there is no section pretrain.validate")
        return self


class FineTune(Section):
    """ViT paper, table 4: SGD with momentum, cosine, no weight decay, clipping at 1."""

    pixels: Count | None = Field(
        None, description="default: twice the resolution of pre-training; of a model of pixels the same, for its sequence grows by four"
    )
    steps: Count = 500
    batch: Count = 512
    lr: list[Positive] = Field([0.003, 0.01, 0.03, 0.06], min_length=1, description="the best on a tenth of the training split is used")
    warmup: Annotated[int, Field(ge=0)] = 0
    seeds: Count | None = None


class Suite(Section):
    """A task: a dataset with labels. `own` is the dataset the run was trained on."""

    name: str
    data: str | None = None
    train: str = "train"
    test: str = "test"
    templates: list[str] = Field(
        ["a photo of a {}."], min_length=1, description="captions of zero-shot, each with {} where the class belongs; their mean is used"
    )
    class_names: list[str] | None = Field(
        None, description="what zero-shot calls the classes, in their order; default: the dataset's names"
    )

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for n, template in enumerate(templates):
            if template.count("{}") != 1:
                raise ValueError(f"{n}: {template!r} should hold {{}} once, where the name of the class belongs")
        return templates


class Evaluate(Section):
    model: str | None = Field(
        None,
        description="in place of a pretrain section: a run, `URL` or `URL@step`, or a published model, as pretrain.start takes it",
    )
    palette: str | None = Field(None, description="the colours of a published model of pixels, as pretrain.palette names them")
    tokenizer: str | None = Field(None, description="the tokens of a published CLIP, as pretrain.text names them")
    suites: list[Suite] = Field(min_length=1)
    protocols: list[str] = ["supervised", "linear", "few-shot", "fine-tune"]
    seeds: Count = 3
    shots: list[Count] = Field([1, 5, 10, 25], min_length=1)
    fine_tune: FineTune = FineTune()
    completions: Annotated[int, Field(ge=0)] = Field(
        0,
        description="test images of the first suite whose lower half a model of pixels draws anew, for the page; and as many from nothing",
    )


class Bound(Section):
    """A number from `min` to `max`, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("min: is missing, and max too; a bound needs one of them")
        return self


class Data(Section):
    """A dataset, or what is left of it: shards are never rewritten, samples are left out as they are read."""

    _plain_key: str = "url"
    url: str | None = Field(None, description="URL, or URL@version; without it a config can only be planned, by `samples` and `classes`")
    samples: Quantity | None = Field(None, description="how many there are, to plan with before the data is at hand")
    classes: Quantity | None = Field(None, description="likewise")
    deny: list[str] = Field([], description="lists of keys to leave out: a text file, a line a key, or Parquet with a column `key`")
    where: dict[str, Bound] = Field({}, description="bounds by column of the index; a sample without the value is left out")
    weight: Positive | None = Field(None, description="share in a mixture, relative to the others; default: the number of samples")

    @model_validator(mode="after")
    def _is_named_or_counted(self) -> Data:
        if self.url is None and self.samples is None:
            raise ValueError("url: is missing, and samples too; name the dataset, or say how many samples to plan for")
        return self


def _or_one_item(schema: dict[str, Any]) -> None:
    """In a JSON schema: what may be a list may be one of its items instead."""
    schema["anyOf"].insert(0, dict(schema["anyOf"][0]["items"]))


_KEPT_NAMES = ("data", "mlartifacts", "mlflow.db")


class Config(Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    storage: StorageSection
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()
    data: list[Data] | None = Field(
        None,
        description="a dataset's URL, or URL@version; or several, to be mixed by weight",
        json_schema_extra=_or_one_item,
    )
    shard: Shard | None = None
    pretrain: Pretrain | None = None
    evaluate: Evaluate | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, data: Any) -> Any:
        return [data] if isinstance(data, str | dict) else data

    @field_validator("data")
    @classmethod
    def _all_weigh_or_none(cls, data: list[Data] | None) -> list[Data] | None:
        if data is not None and not data:
            raise ValueError("names no dataset")
        if data and len({d.weight is None for d in data}) > 1:
            raise ValueError("weight: is given for some of the datasets only; give it for all or for none")
        return data

    @field_validator("name")
    @classmethod
    def _name_is_a_free_word(cls, name: str) -> str:
        if name in _KEPT_NAMES:
            raise ValueError(f"is kept for what lies beside the runs (kept: {', '.join(_KEPT_NAMES)})")
        return _check_word(name)

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        if not (self.shard or self.pretrain or self.evaluate):
            raise ValueError("nothing to do: needs at least one of the sections shard, pretrain, evaluate")
        if self.pretrain and not (self.shard or self.data):
            raise ValueError("pretrain: needs data, a dataset's URL, or a shard section that makes one")
        if self.shard and self.data:
            raise ValueError("data: give either data or a shard section, not both")
        if self.evaluate and not self.pretrain and not self.evaluate.model:
            raise ValueError("evaluate.model: is missing, and there is no pretrain section whose checkpoint could be evaluated")
        if self.evaluate and self.pretrain and self.evaluate.model:
            raise ValueError("evaluate.model: give either that or a pretrain section, whose checkpoint is evaluated")
        return self


def _check_word(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("may hold letters, digits, '.', '_' and '-' only, and begins with a letter or digit")
    return name
