"""mapet: pre-train a Vision Transformer on your own unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapet.errors import MapetError

if TYPE_CHECKING:
    from mapet.inference.load import load
    from mapet.jobs.pretrain.run import pretrain
    from mapet.objectives.cae import CAE
    from mapet.objectives.mae import MAE
    from mapet.objectives.mapet import MaPeT
    from mapet.objectives.mim import MIM
    from mapet.objectives.pim import PIM
    from mapet.objectives.raster import Raster
    from mapet.objectives.simmim import SimMIM
    from mapet.objectives.upstream import load_upstream
    from mapet.tokenizers.files import load_tokenizer

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
    "CAE": "mapet.objectives.cae",
    "MAE": "mapet.objectives.mae",
    "MIM": "mapet.objectives.mim",
    "PIM": "mapet.objectives.pim",
    "MaPeT": "mapet.objectives.mapet",
    "Raster": "mapet.objectives.raster",
    "SimMIM": "mapet.objectives.simmim",
    "load": "mapet.inference.load",
    "load_tokenizer": "mapet.tokenizers.files",
    "load_upstream": "mapet.objectives.upstream",
    "pretrain": "mapet.jobs.pretrain.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mapet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
