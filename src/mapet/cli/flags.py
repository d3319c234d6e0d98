"""Flags made from the configuration: one per key, with its name and text."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from mapet.config.base import Config, admits_none, default_of, marked, override, parse
from mapet.config.recipes import load_recipe
from mapet.config.verb import Verb
from mapet.errors import MapetError, nearest

# File systems take 255 bytes, and beside NAME there is .NAME.lock for a while.
LONGEST_NAME = 255 - len("..lock")

# Flags of earlier versions, and what takes their place.
RENAMED = {"--context-tokens": "--mask-ratio (share of the patches that are predicted)", "--order": "--masking"}


class Parser(argparse.ArgumentParser):
    """Reports errors as MapetError, like every other part of the package."""

    def error(self, message: str) -> NoReturn:
        """Raise MapetError."""
        raise MapetError(f"{message}; see {self.prog} --help")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise MapetError for arguments that are not known."""
        flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), "")
        if flag in RENAMED:
            raise MapetError(f"flag {flag} is now {RENAMED[flag]}; see {self.prog} --help")
        hint = nearest(flag, self._option_string_actions, most=1)
        raise MapetError(f"unrecognized arguments: {' '.join(unknown)}; see {self.prog} --help{hint}")


def build_parser(name: str, verb: Verb) -> Parser:
    """Return the parser of a command."""
    parser = Parser(
        prog=f"mapet {name}",
        description=verb.about or f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        epilog=f"example:\n{verb.example}" if verb.example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter if verb.example else argparse.HelpFormatter,
    )
    fields = {key: field for config in reversed(verb.configs) for key, field in config.model_fields.items()}
    for key, text in (verb.positional or {}).items():
        parser.add_argument(key, nargs=None if verb.required else "?", help=text or fields[key].description)
    if verb.out is not None:
        required = verb.out_metavar is not None and verb.needs_out
        parser.add_argument("--out", required=required, metavar=verb.out_metavar, type=_output_name, help=verb.out)
    if verb.recipe:
        default = verb.recipe if isinstance(verb.recipe, str) else None
        text = "a YAML recipe: a file, or one of the package's by name"
        parser.add_argument("--config", metavar="RECIPE", default=default, help=text)
    if verb.resume is not None:
        parser.add_argument("--resume", action="store_true", help=verb.resume)
    if verb.json is not None:
        parser.add_argument("--json", action="store_true", help=verb.json)
    verb.options(parser)
    for number, config in enumerate(verb.configs):
        _add_config_flags(
            parser, config, {*verb.left_out, *(verb.positional or ())}, "pre-training, " if number else ""
        )
    return parser


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


def _add_config_flags(parser: argparse.ArgumentParser, config: type[Config], left_out: set[str], title: str) -> None:
    groups = {True: parser.add_argument_group(f"{title}common"), False: parser.add_argument_group(f"{title}more")}
    common = marked(config, "common")
    # Keys of the command itself come before those it shares with others.
    for key in sorted(config.model_fields, key=lambda key: key not in config.__annotations__):
        if key in left_out:
            continue
        field, default = config.model_fields[key], default_of(config, key)
        shown = "" if default in (None, False, {}, ()) else f" (default: {_plain(default)})"
        options: dict[str, Any] = {"metavar": key.upper()}
        if _is_mapping(field.annotation):
            options = {"nargs": "+", "metavar": "KEY=VALUE"}
        elif _takes_several(field.annotation):
            options["nargs"] = "+"
        elif bool in (field.annotation, *get_args(field.annotation)):
            options = {"action": argparse.BooleanOptionalAction}
        text = f"{field.description}{shown}".replace("%", "%%")
        groups[key in common].add_argument(f"--{key.replace('_', '-')}", dest=key, help=text, **options)


def _takes_several(annotation: object) -> bool:
    """Whether a key is a tuple of any length, or that or None."""
    return any(get_origin(kind) is tuple and ... in get_args(kind) for kind in (annotation, *get_args(annotation)))


def _is_mapping(annotation: object) -> bool:
    return get_origin(annotation) is dict


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def given_values(parsed: argparse.Namespace, *configs: type[Config]) -> dict[str, Any]:
    """Return the recipe's values overridden by the flags that were given.

    Values of the recipe are checked too, even where a flag replaces them: a wrong one is an error of the recipe.
    """
    recipe = load_recipe(parsed.config, *configs) if getattr(parsed, "config", None) is not None else {}
    for config in configs:
        own = {key: recipe[key] for key in config.model_fields if key in recipe}
        parse(config, own, f"recipe {getattr(parsed, 'config', None)}")
    given: dict[str, Any] = {}
    for config in configs:
        for key, field in config.model_fields.items():
            text = getattr(parsed, key, None)
            if text is None:
                continue
            if _is_mapping(field.annotation):
                before = recipe.get(key)
                given[key] = {**(before if isinstance(before, dict) else {}), **dict(_pair(key, item) for item in text)}
            elif isinstance(text, list):
                given[key] = [part for item in text for part in item.split(",")]
            elif isinstance(text, str) and text.lower() == "none" and admits_none(config, key):
                given[key] = None
            else:
                given[key] = text
    return override(recipe, given, *configs)


def _pair(flag: str, item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise MapetError(f"--{flag.replace('_', '-')} takes KEY=VALUE, for instance depth=4, not {item!r}")
    return key, value
