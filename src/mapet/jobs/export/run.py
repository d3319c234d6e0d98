"""Export of a model, kept only if the export gives what the model gives."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapet.config.base import read_recipe, settle
from mapet.data.open import open_images
from mapet.data.sources import ImageSet
from mapet.engine.files import claimed_folder, new_file, replace_folder
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError, first_line, nearest
from mapet.inference.models import OpenModel, open_model
from mapet.inference.streaming import stream
from mapet.jobs.export.card import model_card
from mapet.jobs.export.config import CONFIGS, SUFFIXES, ExportConfig, TimmExportConfig
from mapet.jobs.export.formats import Exported, require_onnx, write_onnx, write_timm, write_torch

logger = logging.getLogger(__name__)

# Batches of 32 images are cut at these indices into 1, 3 and 28 images: an export must take any number of images.
BATCH_SIZE, CUTS = 32, (1, 4)


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
        if isinstance(config, TimmExportConfig):
            exported = write_timm(opened, fresh, config)
            card = model_card(opened, config, target.name)
            # File names need not be valid Unicode.
            (fresh / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        else:
            exported = write_onnx(opened, fresh) if form == "onnx" else write_torch(opened, fresh)
        logger.info("comparing with the model on %d images of %s", len(images), images.name)
        compared, difference = compare(opened, exported, images)
        # Not ">": the difference may be NaN.
        if not difference <= config.tolerance:
            raise MapetError(
                f"the {form} export of {config.model!r} differs from the model by up to {difference:.3g} on {compared} "
                f"images, more than the tolerance {config.tolerance:g}, so it was not kept; use another format, or "
                "raise --tolerance"
            )
        found.update(
            input_size=[opened.reading.channels, *opened.view.size],
            classes=len(opened.classes),
            images=compared,
            checked_on=images.name,
            largest_difference=difference,
        )

    if suffix:
        with new_file(target) as fresh:
            export(fresh)
    else:
        with claimed_folder(target):
            replace_folder(target, export)
    size = sum(file.stat().st_size for file in (target, *target.glob("*")) if file.is_file())
    return {"path": str(target), "format": form, "bytes": size, "tolerance": config.tolerance, **found}


def compare(opened: OpenModel, exported: Exported, images: ImageSet) -> tuple[int, float]:
    """Run a model and its export on images, in float32, in batches of several sizes.

    Args:
        opened: the model.
        exported: takes ``(B, C, H, W)`` images on the CPU, as the model does, and should return the same.
        images: to compare on; damaged images are left out.

    Returns:
        The number of images, and the largest absolute difference between outputs; NaN if an output holds a NaN.

    Raises:
        MapetError: if the export cannot be run, or no image can be read.
    """

    def difference(batch: Tensor) -> Tensor:
        parts = [part for part in batch.tensor_split(CUTS) if len(part)]
        return torch.stack([(_run(exported, part) - opened.network(part)).abs().max() for part in parts]).max()

    count, largest = 0, torch.tensor(0.0)
    for indices, found in stream(
        difference, images, opened.view, opened.reading, device=opened.device, batch_size=BATCH_SIZE
    ):
        count, largest = count + len(indices), torch.maximum(largest, found)
    return count, largest.item()


def _run(exported: Exported, images: Tensor) -> Tensor:
    try:
        return exported(images)
    except Exception as error:  # of ONNX Runtime, or a guard of torch.export
        raise MapetError(f"the export cannot be run on {len(images)} images: {first_line(error)}") from error


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
