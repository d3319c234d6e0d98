"""mapet: pre-train a Vision Transformer on your own unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapet.errors import MapetError

if TYPE_CHECKING:
    from mapet.inference.load import load
    from mapet.jobs.compare.run import compare
    from mapet.jobs.convert.run import convert
    from mapet.jobs.data.run import index_shards, pack_images
    from mapet.jobs.evaluate.run import evaluate
    from mapet.jobs.export.run import export_model
    from mapet.jobs.finetune.run import finetune
    from mapet.jobs.infer.run import embed_images, predict_images
    from mapet.jobs.pretrain.run import pretrain
    from mapet.jobs.segment.run import segment
    from mapet.jobs.tokenizer.encode import encode_images
    from mapet.jobs.tokenizer.fit import fit_tokenizer
    from mapet.objectives.cae import CAE
    from mapet.objectives.mae import MAE
    from mapet.objectives.mapet import MIM, PIM, MaPeT, Raster
    from mapet.objectives.masking import Mask
    from mapet.objectives.simmim import SimMIM
    from mapet.objectives.targets import Features, Ids, Pixels
    from mapet.objectives.upstream import load_upstream
    from mapet.tokenizers.files import load_tokenizer

__version__ = "0.1.0"

# Public names and where they live. They are imported when first asked for, so that `mapet --help` needs no torch.
_HOMES = {
    "CAE": "objectives.cae",
    "MAE": "objectives.mae",
    "MIM": "objectives.mapet",
    "PIM": "objectives.mapet",
    "MaPeT": "objectives.mapet",
    "Raster": "objectives.mapet",
    "SimMIM": "objectives.simmim",
    "Mask": "objectives.masking",
    "Features": "objectives.targets",
    "Ids": "objectives.targets",
    "Pixels": "objectives.targets",
    "compare": "jobs.compare.run",
    "convert": "jobs.convert.run",
    "embed_images": "jobs.infer.run",
    "encode_images": "jobs.tokenizer.encode",
    "evaluate": "jobs.evaluate.run",
    "export_model": "jobs.export.run",
    "finetune": "jobs.finetune.run",
    "fit_tokenizer": "jobs.tokenizer.fit",
    "index_shards": "jobs.data.run",
    "load": "inference.load",
    "load_tokenizer": "tokenizers.files",
    "load_upstream": "objectives.upstream",
    "pack_images": "jobs.data.run",
    "predict_images": "jobs.infer.run",
    "pretrain": "jobs.pretrain.run",
    "segment": "jobs.segment.run",
}
__all__ = ["MapetError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mapet' has no attribute {name!r}")
    return getattr(import_module(f"mapet.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
