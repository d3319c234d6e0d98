"""A comparison of pre-trainings: a grid of cells that differ in what is compared and in nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mapet.config.base import marked, override, read_recipe
from mapet.engine.files import explain_disk_errors, held_folder, replace_file
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError
from mapet.jobs.compare.cells import finish_cells
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.plan import Plan, make_plan
from mapet.jobs.compare.report import Comparison, best_rate, read_comparison, write_comparison
from mapet.jobs.pretrain.config import PretrainConfig

ASKED = "compare.yaml"


def compare(values: Mapping[str, Any], out: str | Path, *, resume: bool = False) -> Comparison:
    """Pre-train with several objectives and tokenizers in one setting, and measure the networks.

    Every cell has a run folder below ``out/cells``. A comparison that was killed goes on where it was; one that is
    asked for more (seeds, arms, measures) does only what is new.

    Args:
        values: configuration by key: those of ``CompareConfig``, and those of ``PretrainConfig`` that all arms share.
        out: folder of the comparison.
        resume: continue or extend the comparison in ``out``, or begin it if there is none.

    Raises:
        MapetError: for input that cannot work, before anything is trained. A cell that fails later is in the result.
    """
    root = RunFolder(out).root  # refuses an empty name
    with explain_disk_errors(root):
        asked = dict(values)
        if (root / ASKED).exists():
            if not resume:
                raise MapetError(
                    f"output folder {root} holds a comparison; pass --resume to continue or extend it, or another --out"
                )
            asked = override(read_recipe(root / ASKED), asked, CompareConfig, PretrainConfig)
        elif root.exists() and (others := sorted(path.name for path in root.iterdir() if path.name != ".lock")):
            raise MapetError(f"output folder {root} holds {others[0]!r}, but no comparison; choose another --out")
        plan = make_plan(asked, root)
        root.mkdir(parents=True, exist_ok=True)
        with held_folder(root):
            replace_file(root / ASKED, yaml.safe_dump(asked, sort_keys=False))
            return _finish(plan)


def join_comparison(values: Mapping[str, Any], out: str | Path) -> Comparison:
    """Work on the comparison in ``out`` beside the process that began it, on this machine or on another.

    It ends when no cell is left, with the same tables.

    Args:
        values: what may differ here, by key: the place of the images, ``workers``, ``log_every``, ...
        out: folder of the comparison.

    Raises:
        MapetError: if there is no comparison, or a value would make it another.
    """
    root = Path(out)
    if not (root / ASKED).is_file():
        raise MapetError(f"folder {str(out)!r} holds no comparison to join; begin it first, without --join")
    for key in values.keys() - marked(PretrainConfig, "free"):
        raise MapetError(f"a comparison is joined as it is, but {key!r} would make it another; leave it out")
    with explain_disk_errors(root):
        plan = make_plan({**read_recipe(root / ASKED), **values}, root)
        if "data" in values and not any(cell.root.exists() for cell in (*plan.trials(), *plan.cells({}))):
            raise MapetError(
                f"no cell of the comparison in {root} has the images of {str(values['data'])!r}: their number or names "
                "differ; name a copy of those that it began with"
            )
        return _finish(plan)


def _finish(plan: Plan) -> Comparison:
    """Try the learning rates, then finish the cells of the tables; the report is written anew after each cell."""
    for _ in finish_cells(plan.trials()):
        _report(plan)
    chosen = {label: best_rate(tried) for label, tried in _report(plan).rates.items()}
    for _ in finish_cells(plan.cells(chosen)):
        _report(plan)
    return _report(plan)


def _report(plan: Plan) -> Comparison:
    with held_folder(plan.root, ".report", patience_s=-1):  # other processes write it too
        comparison = read_comparison(plan)
        write_comparison(comparison, plan.root)
    return comparison
