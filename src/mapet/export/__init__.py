"""Getting a trained backbone out."""

from mapet.export.timm_folder import export_backbone

__all__ = ["export_backbone"]
