"""Whole jobs, put together from the parts below: what the command line and Python users call."""

from mapet.workflows.bootstrap import bootstrap
from mapet.workflows.compare import compare, join_comparison
from mapet.workflows.converting import convert
from mapet.workflows.demo import measure_run, run_demo
from mapet.workflows.encoding import check_tokens, encode_images
from mapet.workflows.evaluation import evaluate
from mapet.workflows.exporting import export_model
from mapet.workflows.finetune import FinetuneResult, finetune
from mapet.workflows.inference import embed_images, predict_images
from mapet.workflows.pretrain import RunResult, initial_backbone, pretrain
from mapet.workflows.segmentation import evaluate_segmentation
from mapet.workflows.tokenizer import fit_tokenizer, report_on_tokenizer
from mapet.workflows.vqkd import train_vqkd

__all__ = [
    "FinetuneResult",
    "RunResult",
    "bootstrap",
    "check_tokens",
    "compare",
    "convert",
    "embed_images",
    "encode_images",
    "evaluate",
    "evaluate_segmentation",
    "export_model",
    "finetune",
    "fit_tokenizer",
    "initial_backbone",
    "join_comparison",
    "measure_run",
    "predict_images",
    "pretrain",
    "report_on_tokenizer",
    "run_demo",
    "train_vqkd",
]
