"""Getting a trained backbone out."""

from mapet.export.timm_folder import export_network

__all__ = ["export_network"]
