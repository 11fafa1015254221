"""The configuration of a run: what its options are, how they are read, checked and explained."""

from lorafair.config import schema
from lorafair.config.identity import identity_settings
from lorafair.config.loading import load_config, settle, to_yaml
from lorafair.config.schema import *  # noqa: F403 - the classes of the options, as schema.__all__ lists them
from lorafair.errors import ConfigError

__all__ = ["ConfigError", "identity_settings", "load_config", "settle", "to_yaml"]
__all__ += schema.__all__
