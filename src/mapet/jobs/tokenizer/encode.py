"""Token stores from images: made, completed and appended to by one or several processes, and checked."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet.config.base import settle
from mapet.data.batches import DamageTally
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.seeds import Draws
from mapet.data.sources import ImageSet
from mapet.data.stores import StoreError
from mapet.data.views import TrainView
from mapet.data.workers import loading_processes, one_thread, patiently
from mapet.engine.files import explain_disk_errors, held_folder
from mapet.engine.parallel import count_workers, explain_lost_processes, join_processes, main_first, on_main, one_device
from mapet.engine.runfolder import check_out
from mapet.errors import MapetError
from mapet.jobs.tokenizer.config import CheckConfig, EncodeConfig
from mapet.report.progress import Meter
from mapet.targets.tokenizer import check_readable, is_ready
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenstore.store import HEADER_FILE, Header, Rows, State, TokenStore

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 256
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

    folder = Path(out)
    with ExitStack() as held, explain_disk_errors(folder), explain_lost_processes():
        on_main(lambda: held.enter_context(_completed_store(folder, header, images.keys)))
        store = TokenStore(folder)
        reading = _reading(store).within(config)
        stored = StoredImages(images, store, store.find(images.keys), reading, workers, console)
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
    config, device = settle(CheckConfig, values), one_device()
    store = TokenStore(config.tokens)
    states = store.states(np.arange(len(store)))
    counts = {state.name.lower(): int((states == state).sum()) for state in State}
    found: dict[str, Any] = {"rows": len(store), **counts, "missing": [], "changed": [], "agreement": None}
    if config.data is not None:
        images = open_images(config.data)
        tokenizer = _tokenizer_of(store, config)
        workers = count_workers(config.workers, images, device)
        console = console or Console(stderr=True)
        stored = StoredImages(images, store, store.find(images.keys), _reading(store), workers, console)
        states = np.append(states, State.EMPTY)[stored.rows]  # of each image; row -1 stands for no row
        changed = stored.changed(np.flatnonzero((states == State.WRITTEN) | (states == State.DAMAGED)))
        found["missing"] = [images.keys[i] for i in np.flatnonzero(states == State.EMPTY)]
        found["changed"] = [images.keys[i] for i in changed]
        if tokenizer is not None:
            unchanged = np.setdiff1d(np.flatnonzero(states == State.WRITTEN), changed)
            found["agreement"] = stored.agreement(unchanged, tokenizer.to(device))
    agrees = found["agreement"] is None or found["agreement"] >= LEAST_AGREEMENT
    found["ok"] = agrees and not any(found[key] for key in ("empty", "corrupt", "missing", "changed"))
    return found


def _header(config: EncodeConfig, tokenizer: Tokenizer) -> Header:
    view = {name: getattr(config, name) for name in ("crop_min", "flip", "mirror", "views")}
    # Left out if there is none, as in the stores of earlier versions.
    value_range = {} if config.value_range is None else {"value_range": list(config.value_range)}
    return Header(
        tokenizer=config.tokenizer,
        tokenizer_hash=tokenizer.content_hash,
        grid=tokenizer.grid,
        vocab_size=tokenizer.vocab_size,
        view={**view, "channels": config.channels or tokenizer.channels, **value_range},
        views=config.views * (2 if config.mirror else 1),
        seed=config.seed,
    )


def _reading(store: TokenStore) -> Reading:
    """Return what the images of a store were read as."""
    return Reading(store.view_settings.channels, store.view_settings.value_range)


@contextmanager
def _completed_store(folder: Path, header: Header, keys: Sequence[str]) -> Iterator[None]:
    """Make a store, or complete one, so that each key has a row; hold its folder for this process meanwhile.

    Raises:
        MapetError: if the folder cannot be used, or another run writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held_folder(folder):
        has_store = (folder / HEADER_FILE).exists()
        store = TokenStore(folder) if has_store else TokenStore.create(folder, header)
        store.check_header(header)
        store.append(keys)
        yield


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
    return tokenizer


class AllViews(Dataset[tuple[int, Tensor, Tensor, str]]):
    """All views of each image that a token store with this header holds the ids of.

    An item is the image's index, the digest of its content ``(32,)`` uint8, its views ``(K, C, H, W)`` in [0, 1], and
    the reason if the image cannot be decoded (its views are then blank), else an empty string.
    """

    def __init__(self, images: ImageSet, store: TokenStore, reading: Reading, view_size: int) -> None:
        settings, seed = store.view_settings, store.header.seed
        self.images, self.reading, self.count = images, reading, store.header.views
        self.view = TrainView(0, view_size, settings.crop_min, settings.flip, 0.0, (), ())
        self.draws = Draws(seed, seed, settings.views, settings.mirror)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, str]:
        reason = ""
        try:
            image, digest = self.images.load_with_digest(index, self.reading)
        except StoreError:
            raise
        except Exception as error:  # Pillow's plug-ins raise errors of many types for damaged files
            image = torch.zeros(self.reading.channels, 1, 1, dtype=torch.uint8)
            digest = _digest(self.images, index, self.reading)
            reason = f"{type(error).__name__}: {error}"
        drawn = [self.draws.draw(number, self.images.key(index)) for number in range(self.count)]
        with one_thread():
            views = torch.stack([self.view(image, draw)[0] for draw in drawn])
        return index, digest, views, reason


@dataclass(frozen=True)
class ContentDigests(Dataset[tuple[int, Tensor]]):
    """The index of each image and the digest of its content, ``(32,)`` uint8, without decoding it."""

    images: ImageSet
    reading: Reading

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, _digest(self.images, index, self.reading)


def _digest(images: ImageSet, index: int, reading: Reading) -> Tensor:
    """Return the digest of an image's content; zeros if its file cannot be read."""
    try:
        return images.digest(index, reading.max_bytes)
    except (OSError, ValueError):
        return torch.zeros(32, dtype=torch.uint8)


@dataclass(frozen=True)
class StoredImages:
    """Images with their token store; the methods take images by index, ``(n,)``.

    Args:
        images: the data set.
        store: the token store.
        rows: row of each image in the store, ``(len(images),)``; -1 for an image without a row.
        reading: what the images are read as.
        workers: number of processes that load images.
        console: where progress is shown.
    """

    images: ImageSet
    store: TokenStore
    rows: Rows
    reading: Reading
    workers: int
    console: Console

    def pending(self, indices: Rows) -> Rows:
        """Return which images need ids: new, changed and damaged ones, and those with corrupt rows."""
        # Damaged images are tried again in each run, because the decoder may have been the reason.
        written = self.store.states(self.rows[indices]) == State.WRITTEN
        return np.union1d(indices[~written], self.changed(indices[written]))

    def changed(self, indices: Rows) -> Rows:
        """Return which images have another content than when the store was made."""
        changed = np.empty(0, np.int64)
        for index, digests in self._load("reading images", ContentDigests(self.images, self.reading), indices, 256):
            unchanged = self.store.unchanged(self.rows[index], digests.numpy())
            changed = np.append(changed, index[~unchanged])
        return changed

    def encode(self, indices: Rows, tokenizer: Tokenizer, batch_size: int) -> int:
        """Encode images, ``batch_size`` views at a time, and write their rows; return how many are damaged."""
        tally = DamageTally(self.images, most_share=1.0)
        at_once = max(1, batch_size // self.store.header.views)
        for index, digests, ids, reasons in self._encoded("encoding", indices, tokenizer, at_once):
            tally.add([[(i, reason)] if reason else [] for i, reason in zip(index.tolist(), reasons, strict=True)])
            decoded = np.array([not reason for reason in reasons])
            self.store.write(self.rows[index], digests.numpy(), ids, decoded)
        return len(tally.indices)

    def agreement(self, indices: Rows, tokenizer: Tokenizer) -> float | None:
        """Encode a sample of images again; return the share of ids that are as stored, None if there is no image."""
        sample = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:CHECKED_IMAGES].numpy()
        same = []
        for index, _, ids, (reason,) in self._encoded("encoding again", indices[sample], tokenizer, 1):
            if not reason:
                same.append(self.store.ids.rows[self.rows[index]] == ids.numpy())
        return float(np.mean(same)) if same else None

    def _encoded(self, what: str, indices: Rows, tokenizer: Tokenizer, batch_size: int) -> Iterator[Any]:
        """Yield batches of images: index, digests, ids ``(B, K, P)`` on the CPU, and reasons as in ``AllViews``."""
        all_views = AllViews(self.images, self.store, self.reading, tokenizer.input_size)
        for index, digests, views, reasons in self._load(what, all_views, indices, batch_size):
            ids = tokenizer.encode(views.flatten(0, 1).to(tokenizer.device))
            yield index, digests, ids.cpu().view(*views.shape[:2], -1), reasons

    def _load(self, what: str, dataset: Dataset[Any], indices: Rows, batch_size: int) -> Iterator[Any]:
        """Yield batches of items, in the order of ``indices``, and show progress; the first entry is a NumPy array."""
        processes = loading_processes(self.workers, self.images.source.start_method)
        batches = iter(DataLoader(dataset, batch_size, sampler=indices.tolist(), **processes))
        with Meter(self.console, what, len(indices)) as meter:
            for done, (index, *rest) in enumerate(patiently(batches, self.images.name), 1):
                yield index.numpy(), *rest  # a tensor of one element would index arrays like an integer
                meter.show(min(done * batch_size, len(indices)))
