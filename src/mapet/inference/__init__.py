"""A trained model, wherever it comes from, applied to images in order."""

from mapet.inference.load import ImageTransform, Loaded, load
from mapet.inference.models import OpenModel, class_names, open_model
from mapet.inference.streaming import autocast, stream
from mapet.inference.tables import TABLES, Columns, CSVRows, Rows, check_table
from mapet.inference.tokens import Tokens, read_tokens

__all__ = [
    "TABLES",
    "CSVRows",
    "Columns",
    "ImageTransform",
    "Loaded",
    "OpenModel",
    "Rows",
    "Tokens",
    "autocast",
    "check_table",
    "class_names",
    "load",
    "open_model",
    "read_tokens",
    "stream",
]
