"""Arrays in ``.npy`` files that grow row by row and that several processes write."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, open_memmap, write_array_header_1_0
from numpy.typing import NDArray

from mapet.errors import MapetError


class GrowingArray:
    """An array in a file, memory-mapped for reading.

    Args:
        file: an ``.npy`` file.
        dtype: type that the array must have.
        row_shape: shape that a row must have.
        least_rows: number of rows that the array must have at least.

    Attributes:
        rows: the array, read-only, ``(n, *row_shape)``.

    Raises:
        MapetError: if the file is missing, damaged or cut short, or holds another array.
    """

    def __init__(self, file: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...], least_rows: int = 0) -> None:
        self._file = file
        try:
            self._map()
            if (self.rows.dtype, self.rows.shape[1:]) != (dtype, row_shape) or len(self.rows) < least_rows:
                raise ValueError(f"{len(self.rows)} rows of {self.rows.dtype} {self.rows.shape[1:]} do not fit")
        except Exception as error:  # numpy raises errors of many types for a damaged file
            raise MapetError(f"{file} is damaged ({error}); restore it or encode into another folder") from error

    def grow(self, rows: int, content: bytes = b"") -> None:
        """Set the number of rows; ``content`` fills the last rows, other new rows are zeros.

        The number, in the file's header, is written last: after a kill the array has the old or the new number of rows.

        Raises:
            OSError: if the file cannot be written.
        """
        header = header_data_from_array_1_0(self.rows) | {"shape": (rows, *self.rows.shape[1:])}
        with self._file.open("r+b") as file:
            file.truncate(self._offset(rows))
            file.seek(-len(content), os.SEEK_END)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            # numpy pads the header so that it keeps its length when the array grows along its first axis.
            write_array_header_1_0(file, header)
            file.flush()
            os.fsync(file.fileno())
        self._map()

    def write(self, indices: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write rows ``(b,)``; other processes may write other rows at the same time.

        Raises:
            OSError: if the file cannot be written.
        """
        # Not through the memory map: a full disk would end the process with SIGBUS.
        with self._file.open("r+b") as file:
            for index, value in zip(indices.tolist(), values, strict=True):
                file.seek(self._offset(index))
                file.write(value.tobytes())

    def _map(self) -> None:
        mapped = open_memmap(self._file, "r")
        self._start = mapped.offset
        self.rows: NDArray[Any] = mapped.view(np.ndarray)  # np.memmap is slow to index

    def _offset(self, row: int) -> int:
        return self._start + row * self.rows.strides[0]
