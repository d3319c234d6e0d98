"""A trained model, wherever it comes from, applied to images in order."""

from mapet.inference.load import ImageTransform, Loaded, load
from mapet.inference.models import OpenModel, open_model
from mapet.inference.streaming import stream
from mapet.inference.tokens import Tokens, read_tokens

__all__ = ["ImageTransform", "Loaded", "OpenModel", "Tokens", "load", "open_model", "read_tokens", "stream"]
