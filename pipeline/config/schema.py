"""The typed, frozen form of a config.

Names of models, objectives, optimisers, protocols and the like are plain strings here: the rooms that own them check
them against their registries before anything starts, so that a new model needs no change in this file.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipeline.config.data import Data
from pipeline.config.evaluate import Evaluate
from pipeline.config.pretrain import Pretrain
from pipeline.config.section import Bytes, Count, Flag, Part, Positive, Section, Time, check_word
from pipeline.config.shard import Shard
from pipeline.core import units


class StorageSection(Section):
    """Where runs are kept: a URL, or a URL with the endpoint of an S3-compatible store."""

    _plain_key: str = "url"
    url: str
    endpoint: str | None = Field(None, description="of an S3-compatible store; also for every other s3:// URL of the config")
    conditional: Flag = Field(
        True, description="false accepts a store that overwrites where it was asked not to: two jobs may then collide"
    )

    def endpoint_of(self, url: str) -> str | None:
        """The endpoint that serves `url`: this one, where it is on a store of the same kind."""
        return self.endpoint if url.partition("://")[0] == self.url.partition("://")[0] else None


class Tracking(Section):
    """The MLflow server. Default for file storage: SQLite and artifacts in it; other storage needs a uri."""

    uri: str | None = None
    experiment: str = "tessera"


class DeviceSection(Section):
    """What `--plan` counts with: a device of its table (a100, h100, h200, b200, cpu), some of whose figures may be given, or one of
    another name with figures of its own. Of one device, in operations and bytes a second."""

    name: str
    flops: Positive | None = Field(None, description="peak of dense matrix multiplications in 16 bits, such as 989e12")
    flops_fp32: Positive | None = Field(None, description="the same in fp32")
    memory: Bytes | None = Field(None, description="that a process can have, such as '79 GiB'")
    bandwidth: Positive | None = Field(None, description="of its memory")
    link: Positive | None = Field(None, description="to another device of its machine, one way")
    network: Positive | None = Field(None, description="to a device of another machine, one way")
    host: Positive | None = Field(None, description="to its host's memory, one way")
    per_node: Count | None = Field(None, description="devices of a machine")
    price: Positive | None = Field(None, description="an hour; cluster.price, where given, counts instead")
    efficiency: Part | None = Field(None, description="of the peak that forward and backward passes reach")


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
    device: DeviceSection | None = Field(None, description="what --plan counts with; default: this machine's in a local run, else h100")
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
        return check_word(name)

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
