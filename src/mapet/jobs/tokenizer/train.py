"""Train a VQ-KD tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mapet.config.base import continued, parse, read_recipe, settle
from mapet.data.batches import ViewDataset
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import TrainView
from mapet.engine.measuring import with_measured
from mapet.engine.optimizer import build_optimizer
from mapet.engine.parallel import fast_precision, join_processes, main_first, on_main
from mapet.engine.runfolder import RunFolder, check_out, run_folder
from mapet.engine.sinks import Record
from mapet.engine.trainer import Result, Trainer
from mapet.jobs.tokenizer.config import VQKDConfig
from mapet.jobs.tokenizer.vqkd_task import VQKDTask
from mapet.report.progress import ProgressSink
from mapet.targets.sources import TeacherFeatures
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.teachers import build_teacher
from mapet.tokenizers.vqkd import VQKD


def train_vqkd(
    values: Mapping[str, Any], out: str | Path, *, resume: bool = False, console: Console | None = None
) -> Result:
    """Train a VQ-KD tokenizer into ``out/tokenizer``, which is written at every checkpoint.

    Args:
        values: configuration by key, see ``VQKDConfig``; ``data`` and ``teacher`` are required.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        console: where progress is shown; None for standard error.

    Returns:
        the result; ``result.exported`` is the tokenizer's folder.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        world = join_processes()
        if resume and folder.config.exists():
            config = continued(VQKDConfig, read_recipe(folder.config), values, folder.root)
            images = main_first(lambda: open_images(config.data))
        else:
            given = parse(VQKDConfig, values, complete=True)
            images = main_first(lambda: open_images(given["data"]))
            config = settle(
                VQKDConfig, given, images=len(images), processes=world.num_processes, precision=fast_precision()
            )
            config = with_measured(config, images)
        check_out(config.data, folder.root)
        return _train(config, images, folder, resume, console or Console(stderr=True))


def _train(config: VQKDConfig, images: ImageSet, folder: RunFolder, resume: bool, console: Console) -> Result:
    device = torch.device(join_processes().device)
    teacher = main_first(lambda: build_teacher(config.teacher, config.teacher_stage, config.teacher_weights))
    teacher.check_channels(config.channels)
    torch.manual_seed(fold_seed(config.seed, Stream.WEIGHTS))
    half = (0.5,) * config.channels
    sizes = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "vocab_size", "code_dim")
    tokenizer = VQKD(**{size: getattr(config, size) for size in sizes}, mean=half, std=half)
    source = TeacherFeatures(teacher.to(device), config.teacher_size or config.image_size, tokenizer.grid, config.seed)
    task = VQKDTask(tokenizer, source.width, config.decoder_depth, config.ema_decay).to(device)
    on_main(lambda: folder.open(resume=resume))
    on_main(lambda: folder.write_config(config))
    view = TrainView(config.image_size, source.view_size, config.crop_min, config.flip, config.color_jitter, half, half)
    trainer = Trainer(
        config=config,
        task=task,
        optimizer=build_optimizer(task, config),
        dataset=ViewDataset(images, view, Reading.of(config), Draws(config.seed, config.seed)),
        inputs=lambda batch, part: (batch["images"], *source(batch)),
        folder=folder,
        exported=folder.tokenizer,
        export=lambda _, fresh: save_tokenizer(tokenizer, fresh),  # trained in place
        targets_hash=source.content_hash,
        progress=ProgressSink(console, _describe),
        targets_name="the teacher",
    )
    return trainer.run()


def _describe(record: Record) -> str:
    cosine, used = record["cosine"], record["codes_used"]
    return f"loss {record['loss']:.3f}  cosine to the teacher {cosine:.3f}  codes used in a batch {used:.1%}"
