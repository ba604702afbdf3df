"""Every error that the package raises on purpose; a caller can catch `DatamodelsError` for all of them."""


class DatamodelsError(Exception):
    """Something a user can put right; the message says where, what was expected, what came and what to do."""


class ConfigError(DatamodelsError):
    """A command line, configuration file or environment variable that cannot be used."""


class SpecError(DatamodelsError):
    """A spec.json, or a design in it, that cannot be used."""


class StoreError(DatamodelsError):
    """A folder that is not a store, or whose contents contradict their checksums."""


class RowError(DatamodelsError):
    """Values that may not be written into a row; nothing of that row has been written."""


class ClaimLost(DatamodelsError):
    """The row is held by somebody else; what was computed for it may not be written."""


class RegressionError(DatamodelsError):
    """A regression problem that cannot be posed or solved as asked."""
