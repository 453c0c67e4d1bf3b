"""The configuration: `keys` has every key with its unit and default, `checks` what makes one impossible.

Experiments start from `default()` and change what they need. Keys that name something (datasets,
architectures, folders) are checked where the thing is known; everything else is checked by `validate`
before any work starts.
"""

from advtransfer.config.checks import (
    FREE_KEYS,
    ConfigError,
    check_keys,
    conflicts,
    flatten,
    names_key,
    to_json,
    validate,
)
from advtransfer.config.keys import NORMS, STAGES, default
from advtransfer.config.paper import set_paper_grid
from advtransfer.config.sources import parse_source, set_source

__all__ = [
    "FREE_KEYS",
    "NORMS",
    "STAGES",
    "ConfigError",
    "check_keys",
    "conflicts",
    "default",
    "flatten",
    "names_key",
    "parse_source",
    "set_paper_grid",
    "set_source",
    "to_json",
    "validate",
]
