"""Orders (who is visited when) and layouts (who may see whom): pure functions of sizes and a generator."""

from mapet.ordering.layouts import Layout, masked_layout, permuted_layout
from mapet.ordering.orders import ORDERS, blockwise_order, cell_order, random_order, raster_order

__all__ = [
    "ORDERS",
    "Layout",
    "blockwise_order",
    "cell_order",
    "masked_layout",
    "permuted_layout",
    "random_order",
    "raster_order",
]
