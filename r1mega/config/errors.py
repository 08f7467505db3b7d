"""The one exception of this floor."""


class ConfigError(ValueError):
    """A mistake in a configuration, worded for the person who wrote it."""
