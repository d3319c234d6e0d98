"""What all configurations share: how keys are declared, and how values are parsed and settled.

A configuration class lists keys with type, bounds, help text and marks such as ``free``. Users give some of the keys,
in a recipe, as flags (strings) or from Python. ``parse`` checks each value that they gave. ``settle`` adds the missing
values: defaults, and for keys whose default is ``CHOSEN`` what the class's ``choose`` derives from the data, the
network or the machine. The result is frozen and complete.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, create_model
from pydantic_core import PydanticUndefined

from mapet.errors import MapetError, nearest

CHOSEN: Any = object()  # the default of a key that ``choose`` fills in


class Measured(StrEnum):
    """The value of a key whose numbers are measured on a sample of the images when a run begins, and then recorded."""

    DATA = "data"


yaml.SafeDumper.add_representer(Measured, lambda dumper, value: dumper.represent_str(value.value))


class Config(BaseModel):
    """A flat, frozen configuration. Keys are the names of flags and of recipes' entries; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse values that do not go together.

        Args:
            given: what the user gave, of the keys' types; keys not given are missing.

        Raises:
            ValueError: with what is wrong and what to do.
        """

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Return a value for every key whose default is ``CHOSEN``, as given or derived from ``facts``."""
        return {}

    def but(self, **changes: Any) -> Self:
        """Return a copy with some keys changed."""
        return self.model_copy(update=changes)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def key(
    default: Any,
    text: str,
    *,
    common: bool = False,
    free: bool = False,
    single: bool = False,
    instead_of: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare a key of a configuration.

    Args:
        default: value if the user gives none; ``CHOSEN``: what ``choose`` returns; ``...``: the user must give it.
        text: what the key means, for ``--help``.
        common: ``--help`` shows the key among the first.
        free: may change when a run is resumed, because it does not touch what is computed.
        single: is of one run; a comparison of several has no such key.
        instead_of: another key that this one replaces.
        bounds: pydantic's constraints, such as ``ge=0``.
    """
    marks: dict[str, JsonValue] = {"common": common, "free": free, "single": single, "instead_of": instead_of}
    marks["required"] = default is ...
    return Field(... if default is CHOSEN else default, description=text, json_schema_extra=marks, **bounds)


def marked(config_class: type[Config], mark: str) -> frozenset[str]:
    """Return the keys that bear a mark: ``common``, ``free`` or ``single``."""
    return frozenset(name for name in config_class.model_fields if _marks(config_class, name).get(mark))


def _marks(config_class: type[Config], name: str) -> dict[str, Any]:
    marks = config_class.model_fields[name].json_schema_extra
    assert isinstance(marks, dict), f"{name} is not declared by key()"
    return marks


def from_text(value: Any) -> Any:
    """Read a string as YAML reads a value; other values stay as they are."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    try:
        parsed = yaml.safe_load(value)
        return float(parsed) if isinstance(parsed, str) else parsed  # YAML 1.1 takes 1e-3 for a string
    except (ValueError, yaml.YAMLError):
        return value


# Values of a mapping key, whose types are not known here.
Anything = Annotated[Any, BeforeValidator(from_text)]
Scalar = Annotated[int | float | bool | str, BeforeValidator(from_text)]


def admits_none(config_class: type[Config], name: str) -> bool:
    """Whether None is a value of a key."""
    return NoneType in get_args(config_class.model_fields[name].annotation)


@cache
def _partial(config_class: type[AnyConfig]) -> type[AnyConfig]:
    """Return the class with every key optional."""
    fields: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        # Constraints bind the value, not the None that stands for "not given".
        fields[name] = (kind if admits_none(config_class, name) else kind | None, Field(None))
    return create_model(config_class.__name__, __base__=config_class, **fields)


def parse(
    config_class: type[Config], values: Mapping[str, Any], origin: str = "the configuration", *, complete: bool = False
) -> dict[str, Any]:
    """Check the values that a user gave; return them as their types have them.

    None stands for "not given", unless it is a value of the key.

    Args:
        config_class: of the job.
        values: by key.
        origin: of the values, for messages.
        complete: the keys that a user must give must be there.

    Raises:
        MapetError: naming the first wrong key, what is wrong, and for an unknown key the nearest valid one.
    """
    checked = _validate(_partial(config_class), config_class, values, origin)
    given = {
        name: getattr(checked, name)
        for name in config_class.model_fields
        if name in checked.model_fields_set and (getattr(checked, name) is not None or admits_none(config_class, name))
    }
    for name in marked(config_class, "required") if complete else ():
        if given.get(name) is None:
            raise MapetError(f"{origin} lacks {name!r}: {config_class.model_fields[name].description}")
    try:
        config_class.check_together(given)
    except ValueError as error:
        raise MapetError(f"{origin} is wrong: {error}") from None
    return given


def settle(
    config_class: type[AnyConfig], values: Mapping[str, Any], origin: str = "the configuration", **facts: Any
) -> AnyConfig:
    """Return the configuration: what the user gave, what follows from it and ``facts``, and defaults.

    Raises:
        MapetError: see ``parse``; also if the facts do not allow it.
    """
    given = parse(config_class, values, origin)
    return _validate(config_class, config_class, {**given, **config_class.choose(given, **facts)}, origin)


def _validate(model: type[AnyConfig], config_class: type[Config], values: Mapping[str, Any], origin: str) -> AnyConfig:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise MapetError(_first_error(error, config_class, origin)) from None


def _first_error(error: ValidationError, config_class: type[Config], origin: str) -> str:
    wrong = error.errors()
    # A misspelt key first: it may be the very one that is missing.
    first = next((each for each in wrong if each["type"] == "extra_forbidden"), wrong[0])
    name = str(first["loc"][0]) if first["loc"] else ""
    field = config_class.model_fields.get(name)
    if field is None:
        return f"{origin} has the unknown key {name!r}{nearest(name, config_class.model_fields) or '; see --help'}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{origin} lacks {name!r}: {field.description}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_unicode":
        message = "not valid UTF-8; rename it, or link to it by another name"
    value = first["input"]
    shown = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return f"{origin} is wrong: {name} = {shown}: {message[0].lower()}{message[1:]}"


def continued(
    config_class: type[AnyConfig],
    saved: Mapping[str, Any],
    asked: Mapping[str, Any],
    where: Path,
    changeable: Collection[str] = (),
) -> AnyConfig:
    """Return the configuration of a run that is resumed.

    Args:
        config_class: of the run.
        saved: its settled configuration.
        asked: what the user gives now; only free keys may differ.
        where: its folder, for messages.
        changeable: other keys that may differ.

    Raises:
        MapetError: if ``saved`` is damaged or of another command, or another key differs.
    """
    lacking = [name for name in config_class.model_fields if name not in saved]
    strange = [name for name in saved if name not in config_class.model_fields]
    if lacking and strange:
        raise MapetError(
            f"{where} holds the run of another command or version: its configuration has {strange[0]!r}; continue it "
            "with that, or choose another --out"
        )
    if lacking:
        raise MapetError(f"{where / 'config.yaml'} lacks {lacking[0]!r}, so it was cut short or edited; restore it")
    began_with = _validate(config_class, config_class, saved, str(where / "config.yaml"))
    given = {name: value for name, value in parse(config_class, asked).items() if not isinstance(value, Measured)}
    free = marked(config_class, "free").union(changeable)
    for name, value in given.items():
        not_said = value is None and default_of(config_class, name) is None
        if name not in free and not not_said and value != getattr(began_with, name):
            raise MapetError(
                f"{name!r} is {value!r}, but the run in {where} began with {getattr(began_with, name)!r}; a resumed "
                "run must stay the same: drop the change, or start another run with another --out"
            )
    return began_with.but(**{name: value for name, value in given.items() if name in free})


def override(values: Mapping[str, Any], anew: Mapping[str, Any], *config_classes: type[Config]) -> dict[str, Any]:
    """Return values with others on top; a key given anew also drops the key that it is given instead of."""
    replaced = {
        _marks(config_class, name)["instead_of"]
        for config_class in config_classes
        for name in anew
        if name in config_class.model_fields and _marks(config_class, name).get("instead_of")
    }
    return {**{name: value for name, value in values.items() if name not in replaced}, **anew}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML file of configuration values, unchecked.

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


def config_to_yaml(config: Config) -> str:
    """Write a configuration as YAML, in the order of the definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def default_of(config_class: type[Config], name: str) -> Any:
    """Return the default of a key; None where the user must give it or ``choose`` does."""
    default = config_class.model_fields[name].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default
