"""Recipes: YAML files of values, the user's or the package's; a recipe may extend another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapet.config.base import Config, override, read_recipe
from mapet.errors import MapetError, nearest

RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str, *configs: type[Config]) -> dict[str, Any]:
    """Return the values of a recipe; with the key ``base``, on top of those of the recipe that it names.

    Args:
        name: a file, or the name of one of the package's recipes.
        configs: whose keys the recipe has; a key may replace another of the base, as ``steps`` replaces ``epochs``.

    Raises:
        MapetError: if there is none of that name, it cannot be read, or recipes are each other's base.
    """
    return _load(name, configs, ())


def _load(name: str, configs: Sequence[type[Config]], above: tuple[Path, ...]) -> dict[str, Any]:
    path = find_recipe(name)
    if path in above:
        raise MapetError(f"recipe {path} is its own base; remove the line 'base'")
    values = read_recipe(path)
    base = values.pop("base", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    return override(_load(str(beside if beside.is_file() else base), configs, (*above, path)), values, *configs)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a file, or the name of one that comes with the package."""
    if Path(name).is_file():
        return Path(name)
    own = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in RECIPES.rglob("*.yaml")}
    if name in own:
        return own[name]
    raise MapetError(
        f"recipe {name!r} is neither a file nor one of the package's recipes ({', '.join(sorted(own))})"
        f"{nearest(name, own)}"
    )
