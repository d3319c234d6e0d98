"""Token stores from images: made, completed and appended to by one or several processes, and checked."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.console import Console

from mapet.config.base import settle
from mapet.data.open import open_images
from mapet.engine.processes import count_workers, join_processes, main_first, on_main
from mapet.engine.runfolder import check_out, explain_disk_errors, held_folder
from mapet.errors import MapetError
from mapet.jobs.tokenizer.config import CheckConfig, EncodeConfig
from mapet.jobs.tokenizer.passes import StoredImages
from mapet.targets.tokenizer import check_readable, is_ready
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenstore.header import Header
from mapet.tokenstore.store import HEADER_FILE, State, TokenStore

logger = logging.getLogger(__name__)

# Where two codes are equally near, ids may differ: features differ in the last digit by batch and device.
LEAST_AGREEMENT = 0.99


def encode_images(values: Mapping[str, Any], out: str | Path, *, console: Console | None = None) -> dict[str, Any]:
    """Encode images into a new token store, or complete a store: new, changed and unfinished images are encoded.

    Args:
        values: configuration by key, see ``EncodeConfig``; ``data`` and ``tokenizer`` are needed.
        out: folder of the store.
        console: where progress is shown; None for standard error.

    Returns:
        the numbers of images that were ``encoded``, ``kept`` as they were, found ``damaged``, and are in the store but
        not in the data (``absent``); the ``views`` per image; ``seconds``; whether this process ``is_main``.

    Raises:
        MapetError: for input that cannot work, or a full disk. Rows that were written before stay whole.
    """
    config = settle(EncodeConfig, values)
    began = time.perf_counter()
    world = join_processes()
    console = (console or Console(stderr=True)) if world.is_main_process else Console(quiet=True)
    check_out(config.data, out)
    images = main_first(lambda: open_images(config.data))
    tokenizer = main_first(lambda: load_tokenizer(config.tokenizer, config.teacher_weights))
    tokenizer.to(world.device)
    header = _header(config, tokenizer)
    check_readable(config.tokenizer, tokenizer, header.view["channels"])
    workers = count_workers(config.workers, images, world.device)

    with _open_together(Path(out), header, images.keys) as store:
        stored = StoredImages(images, store, store.find(images.keys), workers, console)
        if (stored.rows < 0).any():
            raise MapetError(f"images were added to {config.data} while it was opened; run the command again")
        to_do = stored.pending(np.arange(world.process_index, len(images), world.num_processes))
        found_damaged = stored.encode(to_do, tokenizer, config.batch_size)
        touched, damaged = (sum(gather_object([count])) for count in (len(to_do), found_damaged))
    if damaged > config.max_damaged * len(images):
        raise MapetError(
            f"{damaged} of {len(images)} images of {config.data} cannot be read, and are named above; repair or "
            f"remove them, or raise --max-damaged (now {config.max_damaged:g}); the tokens of the others are kept"
        )
    return {
        "encoded": touched - damaged,
        "kept": len(images) - touched,
        "damaged": damaged,
        "absent": len(store) - len(np.unique(stored.rows)),
        "views": header.views,
        "seconds": round(time.perf_counter() - began, 2),
        "is_main": world.is_main_process,
    }


def check_tokens(values: Mapping[str, Any], *, console: Console | None = None) -> dict[str, Any]:
    """Verify the rows of a token store, compare it with the images it was made from, and encode a sample again.

    Args:
        values: configuration by key, see ``CheckConfig``; ``tokens`` is needed.
        console: where progress is shown; None for standard error.

    Returns:
        the number of ``rows``, and how many are ``written``, ``damaged``, ``empty`` and ``corrupt``; with data the keys
        of the images that are ``missing`` or ``changed``; the share of ids that came out the same (``agreement``, None
        if no image was encoded again); ``ok``.

    Raises:
        MapetError: if the store cannot be opened, or was made with another tokenizer.
    """
    config = settle(CheckConfig, values)
    store = TokenStore.open(config.tokens)
    states = store.states(np.arange(len(store)))
    counts = {state.name.lower(): int((states == state).sum()) for state in State}
    found: dict[str, Any] = {"rows": len(store), **counts, "missing": [], "changed": [], "agreement": None}
    if config.data is not None:
        images = open_images(config.data)
        tokenizer = _tokenizer_of(store, config)
        workers = count_workers(config.workers, images, torch.device("cpu"))
        stored = StoredImages(images, store, store.find(images.keys), workers, console or Console(stderr=True))
        states = np.append(states, State.EMPTY)[stored.rows]  # of each image; row -1 stands for no row
        changed = stored.changed(np.flatnonzero((states == State.WRITTEN) | (states == State.DAMAGED)))
        found["missing"] = [images.keys[i] for i in np.flatnonzero(states == State.EMPTY)]
        found["changed"] = [images.keys[i] for i in changed]
        if tokenizer is not None:
            unchanged = np.setdiff1d(np.flatnonzero(states == State.WRITTEN), changed)
            found["agreement"] = stored.agreement(unchanged, tokenizer)
    agrees = found["agreement"] is None or found["agreement"] >= LEAST_AGREEMENT
    found["ok"] = agrees and not any(found[key] for key in ("empty", "corrupt", "missing", "changed"))
    return found


def _header(config: EncodeConfig, tokenizer: Tokenizer) -> Header:
    channels = tokenizer.channels if config.channels is None else config.channels
    view = {"crop_min": config.crop_min, "flip": config.flip, "mirror": config.mirror}
    return Header(
        tokenizer=config.tokenizer,
        tokenizer_hash=tokenizer.content_hash,
        grid=tokenizer.grid,
        vocab_size=tokenizer.vocab_size,
        view={**view, "views": config.views, "channels": channels},
        views=config.views * (2 if config.mirror else 1),
        seed=config.seed,
    )


@contextmanager
def _open_together(folder: Path, header: Header, keys: Sequence[str]) -> Iterator[TokenStore]:
    """Yield the store on every process, with a row for each key; the main process holds the folder meanwhile.

    Raises:
        MapetError: if the folder cannot be used, or another run writes to it.
    """
    with ExitStack() as held:

        def append() -> None:
            with explain_disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(held_folder(folder))
                has_store = (folder / HEADER_FILE).exists()
                store = TokenStore.open(folder) if has_store else TokenStore.create(folder, header)
                store.check_header(header)
                store.append(keys)

        on_main(append)
        yield TokenStore.open(folder)


def _tokenizer_of(store: TokenStore, config: CheckConfig) -> Tokenizer | None:
    """Return the tokenizer that a store was made with; None, after a warning, if it is not where it was.

    Raises:
        MapetError: if the tokenizer is another one.
    """
    name = config.tokenizer or store.header.tokenizer
    if config.tokenizer is None and not is_ready(name):
        logger.warning("tokenizer %s is missing, so no image is encoded again; name it with --tokenizer", name)
        return None
    tokenizer = load_tokenizer(name, config.teacher_weights)
    if tokenizer.content_hash != store.header.tokenizer_hash:
        raise MapetError(
            f"token store {store.folder} was not made with tokenizer {name!r}; pass that one or encode again"
        )
    return tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
