"""timm networks, found by a run folder, an exported folder or a name, and built with their weights."""

import json
import os
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open

from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError, nearest
from mapet.models.released import RELEASED, released_folder

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # in the notation of safetensors


def create_network(source: str, *, pretrained: bool, **arguments: Any) -> Any:
    """Build a timm network, on the CPU.

    Args:
        source: a run folder (its ``exported/`` is taken), an exported folder, a name in ``RELEASED``, or a timm model
            name, perhaps with ``local-dir:`` or ``hf-hub:``.
        pretrained: load its weights; else they are random.
        arguments: of ``timm.create_model``.

    Raises:
        MapetError: if there is no such network, a file of it is damaged, or its weights cannot be fetched.
    """
    name = _timm_name(released_folder(source))
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder:
        try:
            json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise damaged_export(folder / CONFIG_FILE, error) from error
    try:
        network: Any = timm.create_model(name, pretrained=pretrained, **arguments)
        if folder and pretrained:
            _check_types(folder / WEIGHTS_FILE, network)
    except Exception as error:  # of the file system, safetensors, the hub's HTTP library, torch
        if "drop_path_rate" in str(error):
            raise MapetError(f"model {source!r} has no stochastic depth; pass --drop-path 0") from error
        if folder:
            raise damaged_export(folder, error) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MapetError(
            f"the weights of model {source!r} could not be fetched ({reason}); check the connection, or pass a folder"
        ) from error
    return network


def damaged_export(file: Path, error: Exception) -> MapetError:
    """Return the error for a damaged file of an exported folder, or for the folder itself."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return MapetError(f"{file} is damaged ({reason}); restore it or export the model again")


def _check_types(weights: Path, network: Any) -> None:
    """Raise ValueError for weights that timm converts to floats in silence although they are not floats."""
    wanted = network.state_dict()
    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            kind = file.get_slice(name).get_dtype()
            if name in wanted and wanted[name].is_floating_point() and kind not in FLOAT_TYPES:
                raise ValueError(f"{weights.name} holds {name!r} as {kind}, not as one of {', '.join(FLOAT_TYPES)}")


def _timm_name(source: str) -> str:
    """Return timm's name of a network: a name unchanged, or ``local-dir:`` and the folder of a complete export."""
    is_local = source.startswith("local-dir:")
    folder = Path(source.removeprefix("local-dir:"))
    # os.path, not pathlib: os.path returns False for text that cannot be a file name, where pathlib raises.
    if os.path.isdir(folder):  # noqa: PTH112
        exported = RunFolder(folder).exported
        folder = exported if exported.is_dir() else folder
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise MapetError(
                    f"folder {source!r} is neither a run that was saved at least once nor an exported model: {folder} "
                    f"lacks {name!r}"
                )
        return f"local-dir:{folder}"
    if (":" in source and not is_local) or timm.is_model(source):
        return source
    if os.path.isfile(folder):  # noqa: PTH113
        raise MapetError(
            f"model {source!r} is a file, not a folder; convert a checkpoint of MaPeT's authors with mapet convert, or "
            "name a run, an exported folder or a timm model"
        )
    # No name of timm has a separator.
    if is_local or os.sep in source or os.path.exists(folder):  # noqa: PTH110
        raise MapetError(f"model folder {source!r} does not exist; name a run, an exported folder or a timm model")
    raise MapetError(
        f"unknown model {source!r}: it is neither a run folder, nor an exported folder, nor a timm "
        f"model{nearest(source, [*RELEASED, *timm.list_models()])}"
    )
