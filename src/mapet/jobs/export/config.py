"""The configuration of an export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mapet.config.base import Common
from mapet.config.keys import Count, ModelKeys


class ExportConfig(ModelKeys):
    """Keys of ``mapet export``, whatever the format."""

    check: str | None = Field(
        None,
        min_length=1,
        description="images on which the export is compared with the model: a folder, a text file of paths, or a demo "
        "set; default: those of the run, else mnist",
        json_schema_extra=Common,
    )
    check_images: Count = Field(100, description="number of images that are compared", json_schema_extra=Common)
    tolerance: float | None = Field(
        None,
        ge=0,
        description="largest absolute difference between outputs that is accepted; default: 1e-4, and 0.02 for weights "
        "rounded to float16",
        json_schema_extra=Common,
    )

    @property
    def allowed_difference(self) -> float:
        """The tolerance, or its default."""
        return 1e-4 if self.tolerance is None else self.tolerance


class TimmExportConfig(ExportConfig):
    """Keys of ``mapet export timm``."""

    license: str = Field(
        "unknown",
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
        description="of the weights, as the Hugging Face hub names it, such as apache-2.0 or cc-by-4.0",
        json_schema_extra=Common,
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="type of the stored weights; float16 halves the file and rounds the weights",
        json_schema_extra=Common,
    )

    @property
    def allowed_difference(self) -> float:
        """The tolerance, or its default."""
        return 0.02 if self.tolerance is None and self.dtype == "float16" else super().allowed_difference


# Configuration of each format, and the ending of its file; "" for a folder.
CONFIGS: dict[str, type[ExportConfig]] = {"timm": TimmExportConfig, "onnx": ExportConfig, "torch": ExportConfig}
SUFFIXES = {"timm": "", "onnx": ".onnx", "torch": ".pt2"}
