"""The section `evaluate` of a config: what a trained model is tested on, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.section import Count, Positive, Section, Templates


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
    templates: Templates = Field(
        ["a photo of a {}."], description="captions of zero-shot, each with {} where the class belongs; their mean is used"
    )
    class_names: list[str] | None = Field(
        None, description="what zero-shot calls the classes, in their order; default: the dataset's names"
    )


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
