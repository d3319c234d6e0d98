"""Fine-tuning a model on labelled images, from values to a run folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mapet.config.base import continued, default_of, parse, read_recipe, settle
from mapet.data.augment import AugmentedView
from mapet.data.batches import DamageTally, ViewDataset
from mapet.data.open import labels_to_use, open_labelled
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.engine.files import replace_file
from mapet.engine.lineage import record_origin
from mapet.engine.optimizer import build_optimizer
from mapet.engine.parallel import agree, count_workers, fast_precision, join_processes, main_first, on_main
from mapet.engine.runfolder import RunFolder, check_out, run_folder
from mapet.engine.sinks import Record
from mapet.engine.trainer import Result, Trainer
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.finetune.classification import Classification
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.models.export import export_network
from mapet.probes.labelled import Scores, score_classifier, summarise
from mapet.report.progress import ProgressSink


def finetune(
    values: Mapping[str, Any], out: str | Path, *, resume: bool = False, console: Console | None = None
) -> Result:
    """Fine-tune a model on labelled images.

    Args:
        values: configuration by key, see ``FinetuneConfig``; ``model`` and ``data`` are needed.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        console: where progress is shown; None for standard error.

    Returns:
        the result; ``result.measured`` is what ``results.json`` holds, empty if the run was stopped early, and on any
        process but the main one.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        world = join_processes()
        begun = resume and folder.config.exists()
        if begun:
            config = continued(FinetuneConfig, read_recipe(folder.config), values, folder.root)
            given = config.model_dump()
        else:
            given = parse(FinetuneConfig, values, complete=True)
        check_out(given["data"], folder.root)
        seed = given.get("seed", default_of(FinetuneConfig, "seed"))
        whole, test = main_first(lambda: open_labelled(given["data"], seed))
        train = labels_to_use(whole, given.get("label_share"), given.get("labels_per_class"), seed)
        if not begun:
            config = settle(
                FinetuneConfig, given, images=len(train), processes=world.num_processes, precision=fast_precision()
            )
        return _train(config, train, test, folder, resume, console or Console(stderr=True))


def _train(
    config: FinetuneConfig, train: ImageSet, test: ImageSet, folder: RunFolder, resume: bool, console: Console
) -> Result:
    device = torch.device(join_processes().device)
    # Once there is a checkpoint, the export beside it is the same architecture, and the source may be gone.
    exported = folder.find_export()
    begun = agree(folder.holds_checkpoint() and exported is not None)
    opened = main_first(lambda: _open(config, str(exported) if begun else config.model, train))
    _check_batch_norm(config, opened.network)
    if config.augment is not None and opened.reading.channels not in (1, 3):
        raise MapetError(
            f"model {config.model!r} takes {opened.reading.channels} channels, and timm's policies change "
            "colours of grey and RGB images only; pass --augment none, for brightness and contrast by --color-jitter"
        )
    view = replace(opened.view, interpolation="bicubic")  # as the augmentation resizes, and as the export says
    config = config.but(image_size=view.size, crop_pct=view.crop_pct)
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
    task = Classification(
        opened.network,
        len(train.classes),
        mixup=config.mixup,
        cutmix=config.cutmix,
        smoothing=config.smoothing,
        ema_decay=config.ema_decay,
    ).to(device)

    def begin() -> None:
        folder.open(resume=resume)
        folder.write_config(config)
        if not (begun or config.reinit):
            record_origin(folder, config.model)

    on_main(begin)
    labels = torch.tensor(train.labels)
    latest: list[Scores] = []

    def score(network: nn.Module) -> Scores:
        return score_classifier(
            network,
            test,
            view,
            opened.reading,
            device=device,
            batch_size=config.batch_size,
            workers=count_workers(config.workers, train, device),
            tally=DamageTally(test, config.max_damaged),
        )

    def measure(network: nn.Module) -> Iterator[tuple[str, float]]:
        latest[:] = [score(network)]
        yield "eval_accuracy", latest[0].accuracy

    trainer = Trainer(
        config=config,
        task=task,
        optimizer=build_optimizer(opened.network, config, config.layer_decay),
        dataset=ViewDataset(train, augment, opened.reading, Draws(config.seed, config.seed)),
        inputs=lambda batch, part: (batch["images"], labels[batch["index"]].to(device)),
        folder=folder,
        exported=folder.exported,
        export=partial(
            export_network,
            mean=view.mean,
            std=view.std,
            value_range=opened.reading.value_range,
            crop_pct=view.crop_pct,
            interpolation=view.interpolation,
            classes=train.classes,
            tag="finetuned",
        ),
        targets_hash=hashlib.sha256(json.dumps([train.classes, train.labels]).encode()).hexdigest(),
        progress=ProgressSink(console, _describe),
        evaluators=[measure],
        evaluate_every=config.eval_every,
        targets_name="the labelling",
        save_first=True,
    )
    result = trainer.run()

    def conclude() -> dict[str, Any]:
        # The trainer measures after its last step; a run that was finished before takes none.
        found = summarise([latest[0] if latest else score(task.outcome())])
        replace_file(folder.results, json.dumps(found, indent=1) + "\n")
        return found

    return replace(result, measured=on_main(conclude) or {} if result.finished else {})


def _check_batch_norm(config: FinetuneConfig, network: nn.Module) -> None:
    alone = config.batch_size == join_processes().num_processes * config.accumulate
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
    return replace(opened, reading=opened.reading.within(config))


def _describe(record: Record) -> str:
    return f"loss {record['loss']:.3f}  training accuracy {record['accuracy']:.1%}"
