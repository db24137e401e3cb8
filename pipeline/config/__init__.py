"""One YAML file says what a run is: its schema, how it is loaded, and the hash that names it."""

from pipeline.config.fingerprint import fingerprint
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import Config

__all__ = ["Config", "fingerprint", "load_config", "parse_config"]
