"""Visual token ids made beforehand, tied to the images they were made from."""

from mapet.tokenstore.header import Header
from mapet.tokenstore.store import Report, TokenStore

__all__ = ["Header", "Report", "TokenStore"]
