"""mapet: pre-train a Vision Transformer on your own unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapet.errors import MapetError

if TYPE_CHECKING:
    from mapet.inference import load
    from mapet.objectives import CAE, MAE, MIM, PIM, MaPeT, Raster, SimMIM, load_upstream
    from mapet.tokenizers import load_tokenizer
    from mapet.workflows import pretrain

__version__ = "0.1.0"
__all__ = [
    "CAE",
    "MAE",
    "MIM",
    "PIM",
    "MaPeT",
    "MapetError",
    "Raster",
    "SimMIM",
    "__version__",
    "load",
    "load_tokenizer",
    "load_upstream",
    "pretrain",
]

# Imported when first asked for, so that `mapet --help` does not wait seconds for torch.
_HOMES = {
    "CAE": "mapet.objectives",
    "MAE": "mapet.objectives",
    "MIM": "mapet.objectives",
    "PIM": "mapet.objectives",
    "MaPeT": "mapet.objectives",
    "Raster": "mapet.objectives",
    "SimMIM": "mapet.objectives",
    "load": "mapet.inference",
    "load_tokenizer": "mapet.tokenizers",
    "load_upstream": "mapet.objectives",
    "pretrain": "mapet.workflows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mapet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
