"""Token stores: every view of every image tokenized once; resumed, appended to, shared among processes, checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mapet.config.base import make_config
from mapet.data.batches import DamageTally
from mapet.data.open import open_images
from mapet.data.seeds import Draws
from mapet.data.sources import ImageSet
from mapet.data.views import TrainView
from mapet.engine.loop import on_main
from mapet.engine.processes import count_workers, main_first, make_accelerator
from mapet.engine.training import check_out
from mapet.errors import MapetError
from mapet.jobs.tokenizer.config import CheckConfig, EncodeConfig
from mapet.jobs.tokenizer.passes import ContentOnly, EveryView, load_passes
from mapet.report.progress import Meter
from mapet.targets.tokenizer import check_readable, is_ready
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenstore.header import Header
from mapet.tokenstore.store import TokenStore

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]

WRITE_IMAGES = 512  # written together: each write waits for the disk
CHECKED_IMAGES = 256
# Where two codes are equally near, ids may differ: features differ in the last digit by batch and device.
LEAST_AGREEMENT = 0.99


def encode_images(values: Mapping[str, Any], out: str | Path, *, console: Console | None = None) -> dict[str, Any]:
    """Tokenize images into a new token store, or complete one: what is new, changed, or was not finished.

    Args:
        values: configuration by key, see ``EncodeConfig``; ``data`` and ``tokenizer`` are needed.
        out: the store's folder.
        console: where progress is shown; None for standard error.

    Returns:
        how many images were ``encoded``, ``kept`` as they were, found ``damaged``, and are in the store but not in the
        data (``absent``); ``views`` an image, ``seconds``, and whether this process ``is_main``.

    Raises:
        MapetError: for input that cannot work. What was written before stays whole.
    """
    config = make_config(EncodeConfig, dict(values))
    console = console or Console(stderr=True)
    began = time.perf_counter()
    accelerator = make_accelerator()
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    check_out(config.data, out)
    images = main_first(accelerator, lambda: open_images(config.data))
    tokenizer = main_first(accelerator, lambda: load_tokenizer(config.tokenizer, config.teacher_weights))
    tokenizer.to(accelerator.device)
    header = _header(config, tokenizer)
    check_readable(config.tokenizer, tokenizer, header.view["channels"])
    workers = count_workers(config.workers, images, accelerator.device)

    store, rows = _open_together(Path(out), header, images, accelerator)
    with store:
        mine = np.arange(accelerator.process_index, len(images), accelerator.num_processes)
        to_do = _pending(store, rows, mine, images, workers, console)
        tally = DamageTally(images, most_share=1.0)  # counted below, over all processes
        _encode(store, rows, to_do, images, tokenizer, tally, config.batch_size, workers, console)
        accelerator.wait_for_everyone()
        touched, damaged = len(gather_object(to_do)), len(gather_object(sorted(tally.indices)))
        if damaged > config.max_damaged * len(images):
            raise MapetError(
                f"{damaged} of {len(images)} images of {config.data} cannot be read, and are named above; repair or "
                f"remove them, or raise --max-damaged (now {config.max_damaged:g}); the tokens of the others are kept"
            )
        absent = len(store) - len(np.unique(rows))
    accelerator.wait_for_everyone()
    return {
        "encoded": touched - damaged,
        "kept": len(images) - touched,
        "damaged": damaged,
        "absent": absent,
        "views": header.views,
        "seconds": round(time.perf_counter() - began, 2),
        "is_main": accelerator.is_main_process,
    }


def check_tokens(values: Mapping[str, Any], *, console: Console | None = None) -> dict[str, Any]:
    """Verify a token store: its files, the images it was made from, and a sample of its ids.

    Args:
        values: configuration by key, see ``CheckConfig``; ``tokens`` is needed.
        console: where progress is shown; None for standard error.

    Returns:
        rows by state (``written``, ``damaged``, ``empty``, ``corrupt``); with data the images that are ``missing`` or
        ``changed``, by name; the share of ids that came out the same (``agreement``, None if not tried); ``ok``.

    Raises:
        MapetError: if the store cannot be opened, or the tokenizer is another one.
    """
    config = make_config(CheckConfig, dict(values))
    console = console or Console(stderr=True)
    with TokenStore.open(config.tokens) as store:
        report = store.verify()
        result: dict[str, Any] = {
            "rows": report.rows,
            "written": report.written,
            "damaged": report.damaged,
            "empty": report.empty,
            "corrupt": len(report.corrupt),
            "missing": [],
            "changed": [],
            "agreement": None,
        }
        if config.data is not None:
            images = open_images(config.data)
            workers = count_workers(config.workers, images, torch.device("cpu"))
            tokenizer = _tokenizer_of(store, config)
            whole, rows = _compare(store, images, result, workers, console)
            if tokenizer is not None:
                result["agreement"] = _agreement(store, images, rows, tokenizer, whole, workers, console)
    agrees = result["agreement"] is None or result["agreement"] >= LEAST_AGREEMENT
    result["ok"] = agrees and not any(result[key] for key in ("empty", "corrupt", "missing", "changed"))
    return result


def every_view(images: ImageSet, tokenizer: Tokenizer, header: Header) -> EveryView:
    """Return the views that a store with this header holds the ids of."""
    view = header.view
    return EveryView(
        images,
        TrainView(0, tokenizer.input_size, view["crop_min"], view["flip"], 0.0, (), ()),
        view["channels"],
        Draws(header.seed, header.seed, view["views"], view["mirror"]),
    )


def _header(config: EncodeConfig, tokenizer: Tokenizer) -> Header:
    view = {
        **config.view_settings,
        "views": config.views,
        "channels": tokenizer.channels if config.channels is None else config.channels,
    }
    return Header(
        tokenizer=config.tokenizer,
        kind=tokenizer.kind,
        tokenizer_hash=tokenizer.content_hash,
        grid=tokenizer.grid,
        vocab_size=tokenizer.vocab_size,
        view=view,
        views=config.views * (2 if view["mirror"] else 1),
        seed=config.seed,
    )


def _open_together(folder: Path, header: Header, images: ImageSet, accelerator: Accelerator) -> tuple[TokenStore, Rows]:
    """Open a store on every process; the main one adds rows for new images. Return it, and the row of each image."""

    def begin() -> tuple[TokenStore, Rows]:
        try:
            there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        except OSError as error:
            raise MapetError(f"output {folder} cannot be had ({error}); choose another --out") from error
        if there:
            store = TokenStore.open(folder, writable=True)
            store.check_header(header)
        else:
            store = TokenStore.create(folder, header)
        return store, store.plan(images.keys)

    found = on_main(accelerator, begin)
    rows = torch.from_numpy(found[1]) if found else torch.zeros(len(images), dtype=torch.int64)
    rows = broadcast(rows.to(accelerator.device)).cpu()
    return found[0] if found else TokenStore.open(folder, writable=True), rows.numpy()


def _pending(store: TokenStore, rows: Rows, mine: Rows, images: ImageSet, workers: int, console: Console) -> list[int]:
    """Return which of ``mine`` are to be encoded: those without ids, and those whose content is another than then."""
    empty = store.pending(rows[mine]) | store.damaged(rows[mine])  # those are tried again: a decoder may have failed
    to_do, there = mine[empty].tolist(), mine[~empty].tolist()
    for index, digests in _contents(images, there, workers, console):
        to_do += index[store.pending(rows[index], digests)].tolist()
    return sorted(to_do)


def _contents(
    images: ImageSet, indices: Sequence[int], workers: int, console: Console
) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
    """Yield indices ``(b,)`` and the digests of these images' content ``(b, 32)``."""
    done = 0
    with Meter(console, "reading images", len(indices)) as meter:
        for part in load_passes(ContentOnly(images), indices, 256, workers):
            yield part["index"].numpy(), part["digest"].numpy()
            done += len(part["index"])
            meter.show(done)


def _encode(
    store: TokenStore,
    rows: Rows,
    to_do: Sequence[int],
    images: ImageSet,
    tokenizer: Tokenizer,
    tally: DamageTally,
    batch_size: int,
    workers: int,
    console: Console,
) -> None:
    """Encode images and write them to the store."""
    at_once = max(1, batch_size // store.header.views)
    parts: list[tuple[Tensor, ...]] = []

    def write() -> None:
        index, digests, ids, whole = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        parts.clear()
        store.write(rows[index[whole]], digests[whole], torch.from_numpy(ids[whole]))
        store.mark_damaged(rows[index[~whole]], digests[~whole])

    with Meter(console, "encoding", len(to_do)) as meter:
        passes = load_passes(every_view(images, tokenizer, store.header), to_do, at_once, workers)
        for done, part in enumerate(passes, 1):
            tally.add(part["damaged"])
            whole = torch.tensor([not met for met in part["damaged"]])
            parts.append((part["index"], part["digest"], _encode_views(tokenizer, part["views"]), whole))
            if len(parts) * at_once >= WRITE_IMAGES:
                write()
            meter.show(min(done * at_once, len(to_do)))
    if parts:
        write()


def _encode_views(tokenizer: Tokenizer, views: Tensor) -> Tensor:
    """Map ``(B, K, C, H, W)`` views to ``(B, K, P)`` ids on the CPU."""
    ids: Tensor = tokenizer.encode(views.flatten(0, 1).to(tokenizer.device))
    return ids.cpu().unflatten(0, views.shape[:2])  # type: ignore[no-any-return]


def _compare(
    store: TokenStore, images: ImageSet, result: dict[str, Any], workers: int, console: Console
) -> tuple[list[int], Rows]:
    """Find the images that are ``missing`` or ``changed``; return the indices of the others, and each image's row."""
    rows = store.find(images.keys)
    result["missing"] = [images.keys[i] for i in np.flatnonzero(rows < 0)]
    there = np.flatnonzero(rows >= 0)
    there = there[~store.pending(rows[there])]  # corrupt rows are counted already
    same: list[int] = []
    for index, digests in _contents(images, there.tolist(), workers, console):
        changed = store.pending(rows[index], digests)
        result["changed"] += [images.keys[i] for i in index[changed]]
        same += index[~changed].tolist()
    return same, rows


def _tokenizer_of(store: TokenStore, config: CheckConfig) -> Tokenizer | None:
    """Return the tokenizer that a store was made with, if it can be had."""
    name = config.tokenizer
    if name is None and not is_ready(store.header.tokenizer):
        logger.warning(
            "tokenizer %s is not there, so no ids were made again; pass it with --tokenizer", store.header.tokenizer
        )
        return None
    tokenizer = load_tokenizer(name or store.header.tokenizer, config.teacher_weights)
    if tokenizer.content_hash != store.header.tokenizer_hash:
        raise MapetError(
            f"token store {store.folder} was not made with tokenizer {name or store.header.tokenizer!r}; pass the one "
            "it was made with, or encode again"
        )
    return tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")


def _agreement(
    store: TokenStore,
    images: ImageSet,
    rows: Rows,
    tokenizer: Tokenizer,
    whole: Sequence[int],
    workers: int,
    console: Console,
) -> float | None:
    """Make the ids of some whole images again; return the share that is the same, None if no image can be decoded."""
    drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:CHECKED_IMAGES].tolist()
    views = np.arange(store.header.views)
    same: list[Tensor] = []
    with Meter(console, "encoding again", len(drawn)) as meter:
        chosen = [whole[i] for i in drawn]
        for part in load_passes(every_view(images, tokenizer, store.header), chosen, 1, workers):
            if not any(part["damaged"]):
                index, digest = int(part["index"]), part["digest"].numpy()
                stored = store.read(
                    np.repeat(rows[index], len(views)),
                    views,
                    digest.repeat(len(views), 0),
                    [images.keys[index]] * len(views),
                )
                same.append(stored == _encode_views(tokenizer, part["views"])[0])
            meter.show(len(same))
    return float(torch.cat(same).float().mean()) if same else None
