"""Raster autoregression: MaPeT with one fixed order."""

from __future__ import annotations

from mapet.objectives.mapet import MaPeT


class Raster(MaPeT):
    """MaPeT's layout, visited row by row: what is left of MaPeT when nothing is permuted."""

    default_order = "raster"
