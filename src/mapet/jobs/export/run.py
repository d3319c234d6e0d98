"""Export of a model, kept only if the export gives what the model gives."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mapet.config.base import read_recipe, settle
from mapet.data.open import open_images
from mapet.data.sources import ImageSet
from mapet.engine.files import claimed_folder, new_file, replace_folder
from mapet.engine.lineage import read_run
from mapet.engine.runfolder import RunFolder, explain_disk_errors
from mapet.errors import MapetError, nearest
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.export.card import model_card
from mapet.jobs.export.check import compare
from mapet.jobs.export.config import CONFIGS, SUFFIXES, ExportConfig, TimmExportConfig
from mapet.jobs.export.onnx import read_onnx, require_onnx, write_onnx
from mapet.jobs.export.program import read_program, write_program
from mapet.models.export import export_network

logger = logging.getLogger(__name__)


def export_model(form: str, values: Mapping[str, Any], out: str | Path) -> dict[str, Any]:
    """Export a model, read the export back and compare the two on real images.

    Args:
        form: the format, a key of ``CONFIGS``.
        values: configuration by key, see ``ExportConfig`` and ``TimmExportConfig``; ``model`` is needed.
        out: the file or folder; must not be there yet.

    Returns:
        JSON-able: ``path``, ``format``, ``bytes``, ``input_size`` (channels, rows, columns), ``classes`` (their
        number), and of the comparison ``images``, ``checked_on``, ``largest_difference``, ``tolerance``.

    Raises:
        MapetError: for wrong input, or outputs that differ by more than the tolerance; nothing is written then.
    """
    if form not in CONFIGS:
        raise MapetError(f"unknown format {form!r}{nearest(form, CONFIGS)}")
    config, suffix, target = settle(CONFIGS[form], values), SUFFIXES[form], Path(out)
    if not target.name or (suffix and target.suffix != suffix):
        name = f"a file name that ends in {suffix}" if suffix else "the name of a folder"
        raise MapetError(f"output {str(out)!r} is not {name}; choose another --out")
    if form == "onnx":
        require_onnx()
    found: dict[str, Any] = {}

    def export(fresh: Path) -> None:
        opened = open_model(
            config.model, classifier=True, image_size=config.image_size, crop_pct=config.crop_pct, reinit=config.reinit
        )
        images = _choose_images(config)
        logger.info("exporting %s", config.model)
        exported = _write_and_read(form, opened, fresh, config, target.name)
        logger.info("comparing with the model on %d images of %s", len(images), images.name)
        compared, difference = compare(opened, exported, images)
        # Not ">": the difference may be NaN.
        if not difference <= config.allowed_difference:
            raise MapetError(
                f"the {form} export of {config.model!r} differs from the model by up to {difference:.3g} on {compared} "
                f"images, more than the tolerance {config.allowed_difference:g}, so it was not kept; use another "
                "format, or raise --tolerance"
            )
        found.update(
            input_size=[opened.channels, *opened.view.size],
            classes=len(opened.classes),
            images=compared,
            checked_on=images.name,
            largest_difference=difference,
        )

    with explain_disk_errors(target.parent):
        if suffix:
            with new_file(target) as fresh:
                export(fresh)
        else:
            with claimed_folder(target):
                replace_folder(target, export)
    size = sum(file.stat().st_size for file in (target, *target.glob("*")) if file.is_file())
    return {"path": str(target), "format": form, "bytes": size, "tolerance": config.allowed_difference, **found}


def _write_and_read(
    form: str, opened: OpenModel, path: Path, config: ExportConfig, name: str
) -> Callable[[Tensor], Tensor]:
    """Write an export that will be called ``name``, and return the function that it computes."""
    if form == "onnx":
        write_onnx(opened, path)
        return read_onnx(path)
    if form == "torch":
        write_program(opened, path)
        return read_program(path)
    assert isinstance(config, TimmExportConfig)
    _write_timm(opened, path, config, name)
    network: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return network.eval()


def _write_timm(opened: OpenModel, folder: Path, config: TimmExportConfig, name: str) -> None:
    view = opened.view
    export_network(
        opened.network,
        folder,
        view.mean,
        view.std,
        crop_pct=view.crop_pct,
        interpolation=view.interpolation,
        classes=opened.classes,
        license=config.license,
        tag="untrained" if config.reinit else None,
        dtype=getattr(torch, config.dtype),
    )
    run = None if config.reinit else read_run(config.model)
    card = model_card(opened, run, name, config.license, untrained=config.reinit)
    # File names need not be valid Unicode.
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def _choose_images(config: ExportConfig) -> ImageSet:
    """Return ``check_images`` images, evenly spread over those to be compared on."""
    images = open_images(config.check) if config.check is not None else _default_images(config.model)
    count = min(config.check_images, len(images))
    return images.subset(torch.linspace(0, len(images) - 1, count).long().tolist())


def _default_images(model: str) -> ImageSet:
    """Return the images of the model's run, or a demo set's if there are none."""
    file = RunFolder(model).config
    data = read_recipe(file).get("data") if file.is_file() else None
    if data is not None:
        try:
            return open_images(str(data))
        except MapetError as error:
            logger.warning("the images of the run cannot be opened (%s)", error)
    try:
        return open_images("mnist")
    except MapetError as error:
        raise MapetError(f"{error}; or name images to compare on with --check") from error
