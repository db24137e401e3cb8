"""What a model sees, of the section `pretrain`: how samples are read, and become images, tokens or colours."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.config.section import Bytes, Count, Flag, Fraction, Part, Positive, Section


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
