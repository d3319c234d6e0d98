import logging
from pathlib import Path

import pytest

from mapet.cli.console import set_up_logging
from mapet.data.batches import DamageTally
from mapet.data.open import open_images


def test_a_command_names_a_damaged_image_once(capsys: pytest.CaptureFixture[str], digits: Path) -> None:
    images = open_images(str(digits))
    for _ in range(2):
        set_up_logging()
        for _ in range(3):
            DamageTally(images, 1.0).add([[(0, "cut"), (1, "cut")]])
        said = capsys.readouterr().err.splitlines()
        assert said == [f"warning: skipped damaged image {images.keys[index]} (cut)" for index in (0, 1)]


def test_a_record_is_one_line_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    long = "skipped [bold] /a/path/" + "very/" * 60 + "long.png"
    logging.getLogger("mapet.data").warning(long)
    assert capsys.readouterr().err == f"warning: {long}\n"
