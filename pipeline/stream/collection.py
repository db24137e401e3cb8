"""The datasets that a config's `data` names, opened: what is left of each, and how they are mixed into one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.config import fingerprint
from pipeline.config.data import Bound, Data
from pipeline.config.inputs import Cache, Image
from pipeline.core.errors import ConfigError
from pipeline.core.units import format_bytes
from pipeline.stream.mixture import PARTS, Mixture, whole_shares
from pipeline.stream.order import STRIPE, WINDOW, Order
from pipeline.stream.reader import Dataset, open_dataset


@dataclass(frozen=True)
class Reading:
    """What training asks of the store: `sample_bytes` a sample, in requests for `block` samples each."""

    sample_bytes: float
    block: int

    @property
    def requests(self) -> float:
        """A 1,000 samples, the looks at an index included, one a stripe."""
        return 1000 / self.block + (1000 / (STRIPE * self.block) if self.block > 1 else 0)


@dataclass(frozen=True)
class Collection:
    """One split of one dataset or of several; `weights` are their shares, relative to each other."""

    datasets: list[Dataset]
    parts: list[Data]

    @property
    def weights(self) -> list[float]:
        """As given, or the numbers of samples."""
        return [float(len(d)) if p.weight is None else p.weight for d, p in zip(self.datasets, self.parts, strict=True)]

    @property
    def samples(self) -> int:
        return sum(len(d) for d in self.datasets)

    @property
    def reading(self) -> Reading:
        """Of the whole mixture."""
        weights = self.weights
        mean = sum(d.mean_bytes * w for d, w in zip(self.datasets, weights, strict=True)) / sum(weights)
        return Reading(mean, min(d.block for d in self.datasets))

    @property
    def classes(self) -> list[str]:
        """Names by label; none where a dataset has none.

        Raises:
            ConfigError: datasets with different classes, whose labels would mean different things.
        """
        named = [d.classes for d in self.datasets]
        for other, part in zip(named, self.parts, strict=True):
            if all(named) and other != named[0]:
                raise ConfigError(f"data: {part.url} has other classes than {self.parts[0].url}, so their labels cannot be mixed")
        return named[0] if all(named) else []

    @property
    def hash(self) -> str:
        """Names the content."""
        hashes = [d.manifest.hash for d in self.datasets]
        return hashes[0] if len(hashes) == 1 else fingerprint(hashes)

    def mixture(self, seed: int, global_batch: int, repeats: int = 1) -> Mixture:
        """All samples in one sequence."""
        weights = self.weights
        orders = [
            Order(d.sizes, d.view, seed, block=d.block, row=Fraction(global_batch * share, PARTS * repeats))
            for d, share in zip(self.datasets, whole_shares(weights), strict=True)
        ]
        return Mixture(orders, weights, repeats)

    def check_cache(self, cache: Cache) -> None:
        """Raises ConfigError where the machine's cache cannot hold a window and the next, so that blocks would be fetched again."""
        remote = [d for d in self.datasets if not d.directory.is_local and d.block > 1]
        need = sum(min(2 * WINDOW * STRIPE * d.block * d.mean_bytes, float(d.shards.bytes.sum())) for d in remote)
        if need > cache.size:
            raise ConfigError(
                f"pretrain.loader.cache.size: {format_bytes(cache.size)} is too small for the samples that are mixed at a time, "
                f"which need {format_bytes(need)}; choose at least that, or a smaller pretrain.loader.block"
            )

    def check_pixels(self, image: Image) -> None:
        """Raises ConfigError where images would have to be enlarged and the config does not say so."""
        for dataset, part in zip(self.datasets, self.parts, strict=True):
            check_pixels(dataset, image, part.where)


def open_collection(
    parts: Sequence[Data], split: str = "train", endpoint: str | None = None, *, block: int | None = None, cache: Cache | None = None
) -> Collection:
    """Raises as `open_dataset`; ConfigError for a part without a URL."""
    if missing := [i for i, p in enumerate(parts) if p.url is None]:
        raise ConfigError(f"data.{missing[0]}.url: is missing; a config without it can be planned (--plan), to run it name your dataset")
    datasets = [
        open_dataset(str(p.url), split, endpoint, deny=p.deny, own_deny=p.own_deny, where=p.where, block=block, cache=cache) for p in parts
    ]
    return Collection(datasets, list(parts))


def check_pixels(dataset: Dataset, image: Image, where: Mapping[str, Bound] | None = None, path: str = "pretrain.image.pixels") -> None:
    """Raises ConfigError where images would have to be enlarged and the config does not say so; bounds on their sides count."""
    floors = [int(b.min or 0) if (b := (where or {}).get(side)) else 0 for side in ("width", "height")]
    least = min(max(side, floor) for side, floor in zip(dataset.manifest.smallest, floors, strict=True))
    if least < image.pixels and not image.enlarge:
        raise ConfigError(
            f"{path}: {image.pixels} is more than the smallest side in the dataset, {least} pixels; "
            f"choose {least} or less, or set enlarge: true beside it"
        )
