"""The configuration of an export."""

from collections.abc import Mapping
from typing import Any, Literal

from mapet.config.base import CHOSEN, key
from mapet.config.keys import Count, ModelKeys, Text


class ExportConfig(ModelKeys):
    """Keys of ``mapet export``, whatever the format."""

    check: Text | None = key(
        None,
        "images on which the export is compared with the model: a folder, a text file of paths, or a demo set; "
        "default: those of the run, else mnist",
        common=True,
    )
    check_images: Count = key(100, "number of images that are compared", common=True)
    tolerance: float = key(
        CHOSEN,
        "largest absolute difference between outputs that is accepted; default: 1e-4, and 0.02 for weights rounded to "
        "float16",
        common=True,
        ge=0,
    )

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Return the tolerance."""
        return {"tolerance": given.get("tolerance", 0.02 if given.get("dtype") == "float16" else 1e-4)}


class TimmExportConfig(ExportConfig):
    """Keys of ``mapet export timm``."""

    license: str = key(
        "unknown",
        "of the weights, as the Hugging Face hub names it, such as apache-2.0 or cc-by-4.0",
        common=True,
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
    )
    dtype: Literal["float32", "float16"] = key(
        "float32", "type of the stored weights; float16 halves the file and rounds the weights", common=True
    )


# Configuration of each format, and the ending of its file; "" for a folder.
CONFIGS: dict[str, type[ExportConfig]] = {"timm": TimmExportConfig, "onnx": ExportConfig, "torch": ExportConfig}
SUFFIXES = {"timm": "", "onnx": ".onnx", "torch": ".pt2"}
