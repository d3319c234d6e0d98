"""mapet: pre-train a Vision Transformer on your own unlabelled images."""

from mapet.errors import MapetError
from mapet.objectives import MIM, PIM, MaPeT, Raster, load_upstream

__version__ = "0.1.0"
__all__ = ["MIM", "PIM", "MaPeT", "MapetError", "Raster", "__version__", "load_upstream"]
