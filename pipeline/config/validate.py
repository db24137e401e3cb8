"""The section `pretrain.validate` of a config: what is measured while a model is trained."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.section import Count, Positive, Section, Span, Templates
from pipeline.core import units


class Knn(Section):
    """Accuracy of a vote of the nearest training images, by the cosine of the model's features; as the metric validate/knn."""

    _plain_key = "data"

    data: str | None = Field(None, description="a dataset with labels; default: the run's own")
    train: str | None = Field(None, description="the split whose labels are known; default: pretrain.split")
    test: str | None = Field(None, description="the split that is classified; default: pretrain.validate.split")
    bank: Count = Field(10_000, description="images of known label, at most; their features are held by every rank")
    samples: Count = Field(5_000, description="images that are classified, at most")
    k: Count = 20
    temperature: Positive = Field(0.07, description="a neighbour of cosine s counts exp(s / temperature)")


class ZeroShot(Section):
    """Accuracy of the class whose captions are nearest to an image; as the metric validate/zero_shot."""

    _plain_key = "data"

    data: str | None = Field(None, description="a dataset with labels; default: the run's own")
    split: str | None = Field(None, description="default: pretrain.validate.split")
    samples: Count = Field(5_000, description="images that are classified, at most")
    templates: Templates = Field(["a photo of a {}."], description="captions, each with {} where the class belongs; their mean is used")
    class_names: list[str] | None = Field(None, description="what the classes are called, in their order; default: the dataset's names")


class Validate(Section):
    """The loss on held-out data, and accuracies on small tasks that need no training."""

    every: Span = units.Duration(1, "epoch")
    split: str = "test"
    knn: Knn | None = None
    zero_shot: ZeroShot | None = None
