"""Fine-tuning a model on labelled images, from values to a run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mapet.data.augment import AugmentedView
from mapet.data.batches import Batch, DamageTally, ViewDataset
from mapet.data.labelled import labels_to_use, open_labelled
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.engine.files import replace_file
from mapet.engine.loop import agree, on_main
from mapet.engine.optimizer import build_optimizer
from mapet.engine.processes import count_workers, main_first, make_accelerator
from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import Record
from mapet.engine.training import Job, begin_run, check_out, record_origin, run_folder, run_job, settle_config
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.evaluate.run import summarise
from mapet.jobs.finetune.classification import Classification
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.models.export import export_network
from mapet.probes.classifier import score_classifier
from mapet.probes.metrics import Scores


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a fine-tuning.

    Attributes:
        folder: the run folder; ``exported/`` is the classifier.
        config: the resolved configuration.
        scores: on the test part; None if the run was stopped early, or on any process but the main one.
        steps: optimiser steps done.
        total_steps: optimiser steps of the whole run.
        stopped_by: the signal that ended it early, or None.
        is_main: whether this process is the one that reports.
    """

    folder: RunFolder
    config: FinetuneConfig
    scores: Scores | None
    steps: int
    total_steps: int
    stopped_by: int | None
    is_main: bool


def finetune(
    values: Mapping[str, Any], out: str | Path, *, resume: bool = False, console: Console | None = None
) -> FinetuneResult:
    """Fine-tune a model on labelled images.

    Args:
        values: configuration by key, see ``FinetuneConfig``; ``model`` and ``data`` are needed.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        config = settle_config(FinetuneConfig, values, folder, resume)
        return _run(config, folder, resume, console or Console(stderr=True))


def _run(config: FinetuneConfig, folder: RunFolder, resume: bool, console: Console) -> FinetuneResult:
    accelerator = make_accelerator(config.precision, config.accumulate)
    device = accelerator.device
    check_out(config.data, folder.root)
    whole, test = main_first(accelerator, lambda: open_labelled(config.data, config.seed))
    train = labels_to_use(whole, config.label_share, config.labels_per_class, config.seed)
    config = config.resolve(len(train), accelerator.num_processes)

    # Once there is a checkpoint, the export beside it is the same architecture, and the source may be gone.
    exported = folder.find_export()
    begun = agree(accelerator, folder.holds_checkpoint() and exported is not None)
    opened = main_first(accelerator, lambda: _open(config, str(exported) if begun else config.model, train))
    _check_batch_norm(config, accelerator, opened.network)
    view = replace(opened.view, interpolation="bicubic")  # as the augmentation resizes, and what the export says
    config = config.model_copy(
        update={"image_size": view.size, "crop_pct": view.crop_pct, "precision": accelerator.mixed_precision}
    )
    augment = AugmentedView(
        view.size,
        view.mean,
        view.std,
        config.crop_min,
        config.flip,
        config.augment,
        config.color_jitter,
        config.erasing,
    )
    objective = Classification(
        opened.network,
        len(train.classes),
        mixup=config.mixup,
        cutmix=config.cutmix,
        smoothing=config.smoothing,
        ema_decay=config.ema_decay,
    ).to(device)
    optimizer = build_optimizer(opened.network, config.peak_lr, config.weight_decay, config.beta2, config.layer_decay)
    objective.average_after(optimizer)

    def begin() -> None:
        begin_run(folder, config, resume)
        if not (begun or config.reinit):
            record_origin(folder, config.model)

    on_main(accelerator, begin)
    workers = count_workers(config.workers, train, device)
    dataset = ViewDataset(train, augment, opened.channels, Draws(config.seed, config.seed))
    labels = torch.tensor(train.labels)

    def targets(batch: Batch) -> tuple[Tensor]:
        return (labels[batch["index"]].to(device),)

    def score(network: nn.Module) -> Scores:
        return score_classifier(
            network,
            test,
            view,
            opened.channels,
            device=device,
            batch_size=config.batch_size,
            workers=workers,
            tally=DamageTally(test, config.max_damaged),
        )

    latest: list[Scores] = []

    def measure(trained: nn.Module) -> Iterator[tuple[str, float]]:
        assert isinstance(trained, Classification)
        latest[:] = [score(trained.outcome)]
        yield "eval_accuracy", latest[0].accuracy

    export = partial(
        export_network,
        objective.outcome,
        mean=view.mean,
        std=view.std,
        crop_pct=view.crop_pct,
        interpolation=view.interpolation,
        classes=train.classes,
        tag="finetuned",
    )
    job = Job(
        config,
        dataset,
        objective,
        optimizer,
        targets,
        _hash_labels(train),
        (folder.exported, export),
        _describe,
        [measure],
        config.eval_every or 1,
        "the labelling",
        save_first=True,
    )
    outcome = run_job(job, folder, accelerator, workers, console)

    def conclude() -> Scores:
        # The loop measures after its last step; a run that was finished before takes none.
        scores = latest[0] if latest else score(objective.outcome)
        replace_file(folder.results, json.dumps(summarise([scores]), indent=1) + "\n")
        return scores

    scores = on_main(accelerator, conclude) if outcome.steps == outcome.total_steps else None
    accelerator.wait_for_everyone()
    return FinetuneResult(
        folder, config, scores, outcome.steps, outcome.total_steps, outcome.stopped_by, accelerator.is_main_process
    )


def _check_batch_norm(config: FinetuneConfig, accelerator: Accelerator, network: nn.Module) -> None:
    alone = config.batch_size == accelerator.num_processes * config.accumulate
    if alone and any(isinstance(part, _BatchNorm) for part in network.modules()):
        raise MapetError(
            f"model {config.model!r} has batch norm, which compares images, but it would see one at a time; take a "
            "larger --batch-size, or a smaller --accumulate"
        )


def _open(config: FinetuneConfig, source: str, train: ImageSet) -> OpenModel:
    """Open the model with a fresh classifier for the classes of ``train``."""
    opened = open_model(
        source,
        classifier=True,
        image_size=config.image_size,
        crop_pct=config.crop_pct,
        reinit=config.reinit,
        seed=fold_seed(config.seed, Stream.WEIGHTS),
        drop_path=config.drop_path,
    )
    torch.manual_seed(fold_seed(config.seed, Stream.HEAD))
    pool = {"mean": "avg", "class": "token", None: None}[config.pool]
    network: Any = opened.network
    if pool is not None and not hasattr(network, "num_prefix_tokens"):
        raise MapetError(f"--pool is for Vision Transformers, which model {config.model!r} is not; leave it out")
    network.reset_classifier(len(train.classes), pool)
    return opened


def _hash_labels(images: ImageSet) -> str:
    return hashlib.sha256(json.dumps([images.classes, images.labels]).encode()).hexdigest()


def _describe(record: Record) -> str:
    return f"loss {record['loss']:.3f}  training accuracy {record['accuracy']:.1%}"
