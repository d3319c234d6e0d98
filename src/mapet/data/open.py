"""Opening of images by the name that the user gives."""

from pathlib import Path

from mapet.data.labelled import open_labelled
from mapet.data.names import EXTENSIONS, check_images, is_folder
from mapet.data.sources import ImageSet, from_file, from_folder, from_list


def open_images(source: str) -> ImageSet:
    """Open images: a folder, an image, a text file of paths, or the training part of a demo set.

    Raises:
        MapetError: if there is nothing of that name, or it contains no image.
    """
    check_images(source)
    path = Path(source)
    if is_folder(source):
        return from_folder(path)
    if path.is_file():
        return from_file(path) if path.suffix.lower() in EXTENSIONS else from_list(path)
    return open_labelled(source)[0]
