"""A model written for others, and kept only if it gives what the model gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mapet.config.base import make_config, read_recipe
from mapet.data.open import open_images
from mapet.data.sources import ImageSet
from mapet.engine.files import claimed_folder, new_file, replace_folder
from mapet.engine.runfolder import RunFolder, explain_disk_errors
from mapet.errors import MapetError, nearest
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.export.card import model_card, read_run
from mapet.jobs.export.check import compare
from mapet.jobs.export.config import ExportConfig, TimmExportConfig
from mapet.jobs.export.onnx import read_onnx, require_onnx, write_onnx
from mapet.jobs.export.program import read_program, write_program
from mapet.models.export import export_network

logger = logging.getLogger(__name__)

DEFAULT_IMAGES = "mnist"


@dataclass(frozen=True)
class Format:
    """How models are exported.

    Attributes:
        config_class: of the command.
        write: writes a model into a folder that is there, or to a file; the last argument is where it will lie.
        read: gives back what runs it.
        suffix: of the file; "" for a folder.
        require: refuses if a package is not installed.
    """

    config_class: type[ExportConfig]
    write: Callable[[OpenModel, Path, ExportConfig, Path], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    suffix: str = ""
    require: Callable[[], None] = lambda: None


def _write_timm(opened: OpenModel, folder: Path, config: ExportConfig, target: Path) -> None:
    assert isinstance(config, TimmExportConfig)
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
    card = model_card(opened, run, target.name, config.license, untrained=config.reinit)
    # File names need not be valid Unicode.
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def _read_timm(folder: Path) -> Callable[[Tensor], Tensor]:
    network: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return network.eval()


FORMATS: dict[str, Format] = {
    "timm": Format(TimmExportConfig, _write_timm, _read_timm),
    "onnx": Format(ExportConfig, lambda opened, file, *_: write_onnx(opened, file), read_onnx, ".onnx", require_onnx),
    "torch": Format(ExportConfig, lambda opened, file, *_: write_program(opened, file), read_program, ".pt2"),
}


def export_model(form: str, values: Mapping[str, Any], out: str | Path) -> dict[str, Any]:
    """Export a model, read the export back and compare the two on real images.

    Args:
        form: a key of ``FORMATS``.
        values: configuration by key, see ``ExportConfig`` and ``TimmExportConfig``; ``model`` is needed.
        out: the file or folder; must not be there yet.

    Returns:
        JSON-able: ``path``, ``format``, ``bytes``, ``input_size`` (channels, rows, columns), ``classes`` (how many),
        and of the comparison ``images``, ``checked_on``, ``largest_difference``, ``tolerance``.

    Raises:
        MapetError: for input that cannot work, or outputs that differ by more than the tolerance; nothing is written.
    """
    if form not in FORMATS:
        raise MapetError(f"unknown format {form!r}{nearest(form, FORMATS)}")
    chosen = FORMATS[form]
    config = make_config(chosen.config_class, dict(values))
    target = Path(out)
    if not target.name or (chosen.suffix and target.suffix != chosen.suffix):
        name = f"a file name that ends in {chosen.suffix}" if chosen.suffix else "the name of a folder"
        raise MapetError(f"output {str(out)!r} is not {name}; choose another --out")
    chosen.require()
    found: dict[str, Any] = {}

    def export(fresh: Path) -> None:
        opened = open_model(
            config.model, classifier=True, image_size=config.image_size, crop_pct=config.crop_pct, reinit=config.reinit
        )
        images = _choose_images(config)
        logger.info("exporting %s", config.model)
        chosen.write(opened, fresh, config, target)
        logger.info("comparing with the model on %d images of %s", len(images), images.name)
        agreement = compare(opened, chosen.read(fresh), images)
        # Not ">": the difference may be NaN.
        if not agreement.largest_difference <= config.allowed_difference:
            raise MapetError(
                f"the {form} export of {config.model!r} differs from the model by up to "
                f"{agreement.largest_difference:.3g} on {agreement.images} images, more than the tolerance "
                f"{config.allowed_difference:g}, so it was not kept; use another format, or raise --tolerance"
            )
        found.update(
            input_size=[opened.channels, *opened.view.size],
            classes=len(opened.classes),
            images=agreement.images,
            checked_on=images.name,
            largest_difference=agreement.largest_difference,
        )

    with explain_disk_errors(target.parent):
        if chosen.suffix:
            with new_file(target) as fresh:
                export(fresh)
        else:
            with claimed_folder(target):
                replace_folder(target, export)
    size = sum(file.stat().st_size for file in (target, *target.glob("*")) if file.is_file())
    return {"path": str(target), "format": form, "bytes": size, "tolerance": config.allowed_difference, **found}


def _choose_images(config: ExportConfig) -> ImageSet:
    """Return images to compare on, spread over those that were named, or the run's own, or a demo set's."""
    images = open_images(config.check) if config.check is not None else _images_of_run(config.model) or _demo_images()
    count = min(config.check_images, len(images))
    return images.subset(torch.linspace(0, len(images) - 1, count).long().tolist())


def _images_of_run(model: str) -> ImageSet | None:
    file = RunFolder(model).config
    data = read_recipe(file).get("data") if file.is_file() else None
    if data is None:
        return None
    try:
        return open_images(str(data))
    except MapetError as error:
        logger.warning("the run's own images cannot be had (%s)", error)
        return None


def _demo_images() -> ImageSet:
    try:
        return open_images(DEFAULT_IMAGES)
    except MapetError as error:
        raise MapetError(f"{error}; or name images to check the export on with --check") from error
