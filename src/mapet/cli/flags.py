"""Flags made from the configuration: one per key, with its name and description."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from mapet.config.base import StrictConfig, has_mark, override
from mapet.config.recipes import load_recipe
from mapet.errors import MapetError, nearest

# The longest that file systems take is 255, and beside NAME there is .NAME.lock for a while.
LONGEST_NAME = 255 - len("..lock")


class Parser(argparse.ArgumentParser):
    """Says what is wrong as every other part of the package does: by MapetError."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_defaults(parser=self)  # of the innermost verb, when all is parsed

    def error(self, message: str) -> NoReturn:
        """Raise MapetError."""
        raise MapetError(f"{message}; see {self.prog} --help")

    def refuse(self, strange: Sequence[str]) -> NoReturn:
        """Raise MapetError for arguments that are not known."""
        flag = next((argument.partition("=")[0] for argument in strange if argument.startswith("-")), "")
        raise MapetError(
            f"unrecognized arguments: {' '.join(strange)}; see {self.prog} --help"
            f"{nearest(flag, self._option_string_actions, most=1)}"
        )


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        MapetError: for what argparse does not understand.
    """
    parsed, strange = parser.parse_known_args(arguments)
    if strange:
        parsed.parser.refuse(strange)
    return parsed


def add_out_flag(parser: argparse.ArgumentParser, text: str, metavar: str = "FOLDER", *, required: bool = True) -> None:
    """Add ``--out``: a name that every part of a command can write, log and put into a file."""
    parser.add_argument("--out", required=required, metavar=metavar, type=_output_name, help=text)


def _output_name(text: str) -> str:
    try:
        parts = [part.encode() for part in Path(text).parts or ("",)]
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8; choose another name") from None
    longest = max(parts, key=len)
    if len(longest) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"the name {longest[:20].decode(errors='ignore')!r}... is {len(longest)} bytes long; choose one of at most "
            f"{LONGEST_NAME} bytes"
        )
    return text


def add_job_flags(
    parser: argparse.ArgumentParser,
    config_class: type[StrictConfig],
    out: str,
    data: str = "images; may also stand in the recipe",
    *,
    model: bool = False,
    out_metavar: str = "FOLDER",
    needs_out: bool = True,
) -> None:
    """Add what every job takes: images, ``--out``, a recipe, and the flags of its configuration.

    Args:
        parser: of the verb.
        config_class: of the job.
        out, data: help for these two.
        model: whether one stands before the images.
        out_metavar: what ``--out`` takes.
        needs_out: whether it must be given.
    """
    if model:
        parser.add_argument("model", nargs="?", help=config_class.model_fields["model"].description)
    parser.add_argument("data", nargs="?", help=data)
    add_out_flag(parser, out, out_metavar, required=needs_out)
    parser.add_argument("--config", metavar="RECIPE", help="a YAML recipe: a file, or one of the package's by name")
    add_config_flags(parser, config_class, ("model", "data") if model else ("data",))


def add_config_flags(
    parser: argparse.ArgumentParser,
    config_class: type[StrictConfig],
    left_out: Sequence[str] = ("data",),
    title: str = "",
) -> None:
    """Add a flag for every key of a configuration, below a title if it is one of several.

    Left out is for instance what is positional.
    """
    common = parser.add_argument_group(f"{title}common")
    more = parser.add_argument_group(f"{title}more")
    fields = config_class.model_fields
    # What is particular to the command comes first.
    for key in sorted(fields, key=lambda key: key not in config_class.__annotations__):
        if key in left_out:
            continue
        field = fields[key]
        group = common if has_mark(config_class, key, "common") else more
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, PydanticUndefined, False, {}) else f" (default: {_plain(default)})"
        text = f"{field.description}{shown}".replace("%", "%%")
        flag = f"--{key.replace('_', '-')}"
        if _is_mapping(field.annotation):
            group.add_argument(flag, dest=key, nargs="+", metavar="KEY=VALUE", help=text)
        elif _takes_several(field.annotation):
            group.add_argument(flag, dest=key, nargs="+", metavar=key.upper(), help=text)
        elif bool in (field.annotation, *get_args(field.annotation)):
            group.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, dest=key, metavar=key.upper(), help=text)


def _takes_several(annotation: object) -> bool:
    """Whether a key is a tuple of any length, or that or None."""
    return any(get_origin(kind) is tuple and ... in get_args(kind) for kind in (annotation, *get_args(annotation)))


def _is_mapping(annotation: object) -> bool:
    return get_origin(annotation) is dict


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def given_values(parsed: argparse.Namespace, *config_classes: type[StrictConfig]) -> dict[str, Any]:
    """Return the recipe's values overridden by the flags that were given, of one or several configurations."""
    recipe: dict[str, Any] = {}
    if getattr(parsed, "config", None) is not None:
        recipe = load_recipe(parsed.config)
    fields = {key: field for config_class in config_classes for key, field in config_class.model_fields.items()}
    given: dict[str, Any] = {}
    for key, field in fields.items():
        text = getattr(parsed, key, None)
        if text is None:
            continue
        if _is_mapping(field.annotation):
            before = recipe.get(key)
            given[key] = {**(before if isinstance(before, dict) else {}), **dict(_pair(key, item) for item in text)}
        elif isinstance(text, list):
            given[key] = [_parse(part) for item in text for part in item.split(",")]
        elif isinstance(text, bool):
            given[key] = text
        else:
            optional = field.default is None
            as_text = key in _TEXT_KEYS and not (optional and text == "none")
            given[key] = text if as_text else _parse(text)
    return override(recipe, given)


_TEXT_KEYS = frozenset(
    {
        "check",
        "data",
        "eval_data",
        "file",
        "image_size",
        "init",
        "license",
        "model",
        "precision",
        "teacher",
        "teacher_weights",
        "tokenizer",
        "tokens",
    }
)


def _parse(text: str) -> Any:
    """Read a flag as YAML reads a value, so that both ways of saying it mean the same."""
    if text.lower() == "none":
        return None
    try:
        value = yaml.safe_load(text)
        # YAML 1.1 takes 1e-3 for a string: it wants a point.
        return float(value) if isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return text


def _pair(flag: str, item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals:
        raise MapetError(f"--{flag.replace('_', '-')} takes KEY=VALUE, for instance depth=4, not {item!r}")
    return key, _parse(value)
