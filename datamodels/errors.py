"""Every error that the package raises on purpose; a caller can catch `DatamodelsError` for all of them."""

import json


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


class MeasurementError(DatamodelsError):
    """Arrays, a model or a data set of which a measurement cannot be taken."""


class RankingError(DatamodelsError):
    """Scores of models that cannot be read, joined with what fine-tuning reached, or ranked."""


_JSON_HINTS = {
    "Expecting value": "a value is missing or not in double quotes; no comma behind the last one; true, false and null "
    "in lower case; no comments",
    "Expecting property name": "names stand in double quotes, and no comma behind the last entry",
    "Illegal trailing comma": "no comma behind the last entry",
    "Expecting ',' delimiter": "a comma between two entries or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon between a name and its value is missing",
    "Extra data": "the file goes on behind the end of its first value",
    "Unterminated string": "a double quote is missing",
    "Invalid control character": "a line ends inside double quotes",
}


def json_mistake(error: json.JSONDecodeError) -> str:
    """What is wrong with a text that should be JSON, and how it is usually put right."""
    if not error.doc.strip():
        return "not JSON: it is empty"
    hint = next((hint for begin, hint in _JSON_HINTS.items() if error.msg.startswith(begin)), error.msg)
    if error.pos >= len(error.doc.rstrip()):
        hint = "it ends too soon; a closing bracket or quote is missing"
    return f"not JSON: {hint}"
