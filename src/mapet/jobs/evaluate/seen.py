"""How many of the evaluated images a fine-tuned model was trained on."""

from functools import cache
from pathlib import Path

from mapet.config.base import read_recipe
from mapet.data.labelled import labels_to_use, open_labelled
from mapet.data.sources import ImageSet
from mapet.engine.runfolder import run_of
from mapet.errors import MapetError


def count_seen(model: str, images: ImageSet) -> int | None:
    """Count the files of ``images`` that a fine-tuned run was trained on; None if that cannot be determined.

    Args:
        model: see ``engine.runfolder.run_of``.
        images: the evaluated images.
    """
    run = run_of(model)
    if run is None:
        return None
    try:
        config = read_recipe(run.config)
        choice = config["label_share"], config["labels_per_class"], config["seed"]
        seen = labels_to_use(open_labelled(config["data"], config["seed"])[0], *choice)
    except (MapetError, KeyError, TypeError):  # a run of another command, a changed config, or missing images
        return None
    return len(_files(images) & _files(seen))


def _files(images: ImageSet) -> set[Path]:
    """Return the real paths of the image files; two names of one folder give the same paths."""
    real = cache(Path.resolve)
    paths = (images.path(index) for index in range(len(images)))
    return {real(path.parent) / path.name for path in paths if path is not None}
