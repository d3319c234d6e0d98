from __future__ import annotations

import logging

import pytest

from mapet.cli.output import set_up_logging


def test_a_record_is_one_line_and_is_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    long = "skipped [bold] /a/path/" + "very/" * 60 + "long.png"
    logging.getLogger("mapet.data").warning(long)
    logging.getLogger("mapet.data").info("fitted in 2 s")
    assert capsys.readouterr().err.splitlines() == [f"warning: {long}", "fitted in 2 s"]
