from __future__ import annotations

from dataclasses import replace

from torch import nn

from mapet.data.views import PlainView
from mapet.inference.models import OpenModel
from mapet.jobs.export.inputs import describe_inputs


def test_how_both_sides_are_cropped_is_told() -> None:
    opened = OpenModel("flat", nn.Flatten(), PlainView((4, 6), (0.5,), (0.25,), 0.9), 1, ())
    assert describe_inputs(opened)["crop_mode"] == "center"
    squashing = replace(opened, view=replace(opened.view, squash=True))
    assert describe_inputs(squashing)["crop_mode"] == "squash"
