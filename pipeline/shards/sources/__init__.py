"""Where images come from. New kinds of source are added here, under the word that `shard.source.format` names them by."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config.schema import StorageSection
from pipeline.config.shard import Shard
from pipeline.config.shard import Source as SourceSection
from pipeline.core.errors import ConfigError, choose
from pipeline.shards.sources.archives import TarSource as TarSource
from pipeline.shards.sources.base import Files as Files
from pipeline.shards.sources.base import Ignored as Ignored
from pipeline.shards.sources.base import Item as Item
from pipeline.shards.sources.base import Lost as Lost
from pipeline.shards.sources.base import Part as Part
from pipeline.shards.sources.base import Source as Source
from pipeline.shards.sources.base import Survey as Survey
from pipeline.shards.sources.embedded import TableSource as TableSource
from pipeline.shards.sources.folder import FolderSource as FolderSource
from pipeline.shards.sources.urls import UrlSource as UrlSource

SOURCES: dict[str, Callable[[SourceSection, str | None], Source]] = {
    "folder": lambda section, endpoint: FolderSource(section.url, endpoint),
    "urls": lambda section, endpoint: UrlSource(section.url, section.columns, endpoint),
    "table": lambda section, endpoint: TableSource(section.url, section.columns, endpoint),
    "tars": lambda section, endpoint: TarSource(section.url, endpoint),
}
_WITHOUT_COLUMNS = {"folder": "a folder", "tars": "a tar"}


def open_source(section: SourceSection, storage: StorageSection | None = None) -> Source:
    """The source that a config names; in the store that the config's `storage` names, unless the section names another.

    Raises:
        ConfigError: `shard.source.format` is not known, or the section has keys that this format does not use.
    """
    make = SOURCES[choose("shard.source.format", section.format, SOURCES)]
    if section.columns and section.format in _WITHOUT_COLUMNS:
        raise ConfigError(f"shard.source.columns: {_WITHOUT_COLUMNS[section.format]} has no columns, leave this out")
    return make(section, section.endpoint or (storage.endpoint_of(section.url) if storage else None))


def check_source(shard: Shard, storage: StorageSection | None = None) -> None:
    """Preflight: raise what is wrong with the source, before anything starts and without reading an image.

    Raises:
        ConfigError, DataError, StorageError: naming the config path.
    """
    open_source(shard.source, storage).check()
