"""The cells of a comparison finished one by one, beside other processes that do the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mapet.engine.runfolder import held_folder
from mapet.errors import MapetError
from mapet.jobs.compare.cells import Cell, read_record, run_cell

logger = logging.getLogger(__name__)

POLL_S = 5.0  # between looks at what other processes do


def finish_cells(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Finish the cells that are not done; yield each after its end, be it a failure, of which its record tells.

    A cell that another process works on is left to it, and waited for in the end: if that process is killed, the cell
    is finished here; if it fails there, it is not tried again.
    """
    left, is_first_round = list(enumerate(cells, 1)), True
    while left:
        others = []
        for number, cell in left:
            if cell.is_done:
                continue
            with _claimed(cell) as is_ours:
                if not is_ours:
                    others.append((number, cell))
                    continue
                if cell.is_done or (not is_first_round and "failed" in read_record(cell.root)):  # meanwhile
                    continue
                logger.info("cell %d of %d: %s", number, len(cells), cell.title)
                if (failure := run_cell(cell)) is not None:
                    logger.warning("cell %s failed: %s; the others go on", cell.title, failure)
            yield cell
        if others and (is_first_round or len(others) < len(left)):
            logger.info("waiting for %d cells that other processes work on", len(others))
        if others:
            time.sleep(POLL_S)
        left, is_first_round = others, False


@contextmanager
def _claimed(cell: Cell) -> Iterator[bool]:
    """Hold a cell for this process; False if another works on it."""
    cell.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(held_folder(cell.root, ".claim"))
        except MapetError:
            yield False
        else:
            yield True
