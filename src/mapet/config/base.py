"""What all configurations share: strictness, marks on keys, reading and writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from mapet.errors import MapetError, nearest

# Marks on fields: shown first by --help; may change on resume, since it does not touch what is computed.
Common: dict[str, JsonValue] = {"common": True}
Free: dict[str, JsonValue] = {"free": True}


class StrictConfig(BaseModel):
    """Flat, frozen; unknown keys are errors. Keys are the names of flags and of recipes' entries alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


Config = TypeVar("Config", bound=StrictConfig)


def has_mark(config_class: type[StrictConfig], key: str, mark: str) -> bool:
    """Whether a key's definition carries ``mark`` ("common" or "free")."""
    extra = config_class.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def free_keys(config_class: type[StrictConfig]) -> frozenset[str]:
    """Keys that may change when a run is resumed."""
    return frozenset(name for name in config_class.model_fields if has_mark(config_class, name, "free"))


def make_config(config_class: type[Config], values: dict[str, Any], origin: str = "the configuration") -> Config:
    """Validate values by key.

    Raises:
        MapetError: naming the first wrong key, what is wrong, and for an unknown key the nearest valid one.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()
        # A misspelt key first: it may be the very one that is missing.
        first = next((each for each in wrong if each["type"] == "extra_forbidden"), wrong[0])
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(key, config_class.model_fields) or "; see --help"
            raise MapetError(f"{origin} has the unknown key {key!r}{hint}") from None
        if first["type"] == "missing":
            field = config_class.model_fields.get(key)
            what = f": {field.description}" if field and field.description else ""
            raise MapetError(f"{origin} lacks {key!r}{what}") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_unicode":
            message = "not valid UTF-8; rename it, or link to it by another name"
        message = message[0].lower() + message[1:]
        where = f"{key} = {first['input']!r}: " if key else ""
        raise MapetError(f"{origin} is wrong: {where}{message}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML file of configuration values, unvalidated.

    Raises:
        MapetError: if the file is missing or is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise MapetError(f"recipe {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MapetError(f"recipe {path} cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MapetError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise MapetError(f"recipe {path} must hold 'key: value' lines, but it is a {type(values).__name__}")
    return values


# Keys of which one says what the other does.
ALTERNATIVES = ({"steps", "epochs"}, {"lr", "lrs"})


def override(values: dict[str, Any], anew: dict[str, Any]) -> dict[str, Any]:
    """Return values with others on top; what is said anew in steps replaces epochs, and so with all alternatives."""
    gone = {key for keys in ALTERNATIVES if keys & anew.keys() for key in keys}
    return {**{key: value for key, value in values.items() if key not in gone}, **anew}


def config_to_yaml(config: StrictConfig) -> str:
    """Write a configuration as YAML, in the order of the definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
