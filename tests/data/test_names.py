import subprocess
import sys
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.data.names import DEMO_NAMES, check_images, check_labelled


def test_import_needs_neither_torch_nor_numpy() -> None:
    script = "import sys, mapet.data.names; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_folders_files_and_demo_sets_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    check_images(str(tmp_path / "list.txt"))
    for source in (str(tmp_path), *DEMO_NAMES):
        check_images(source)
        check_labelled(source)


def test_files_of_several_images_and_other_places_are_accepted(tmp_path: Path) -> None:
    for name in ("x.tar", "x.NPZ", "x.parquet"):
        (tmp_path / name).touch()
        check_labelled(str(tmp_path / name))
    for source in ("hf:cifar10", "s3://bucket/x"):
        check_images(source)
        check_labelled(source)


def test_other_names_are_refused(tmp_path: Path) -> None:
    for check in (check_images, check_labelled):
        for name in ("missing", "x" * 5000):
            with pytest.raises(MapetError, match="is neither a folder"):
                check(name)
        with pytest.raises(MapetError, match="did you mean 'fashion-mnist'"):
            check("fashion_mnist")
    (tmp_path / "image.png").touch()
    with pytest.raises(MapetError, match="neither a folder with one subfolder per class nor a demo set"):
        check_labelled(str(tmp_path / "image.png"))
