import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mapet import MapetError
from mapet.engine.lineage import read_run, record_origin, strip_paths
from mapet.engine.runfolder import RunFolder
from mapet.jobs.compare.table import read_results
from mapet.targets.baseline import measure_baseline


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run whose checkpoint was removed."""
    folder = RunFolder(tmp_path / "photos")
    folder.exported.mkdir(parents=True)
    folder.config.write_text("data: /home/me/images\nmodel: vit_tiny_patch16_224\n")
    records = [{"step": step, "loss": float(step), "lr": 0.1, "knn": None if step else 0.5} for step in range(150)]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder.results.write_text('{"accuracy": 0.9}')
    return folder


def test_the_record_of_a_run_has_its_last_metrics(run: RunFolder) -> None:
    record = read_run(run.root)
    assert record is not None
    assert record.config == {"data": "images", "model": "vit_tiny_patch16_224"}
    assert record.metrics == {"loss": 99.5, "knn": 0.5}  # the mean loss of 100 records, the last k-NN accuracy
    assert (record.images, record.last["step"], record.results) == (None, 149, {"accuracy": 0.9})
    assert (record.baseline, record.origin) == ({}, {})
    assert read_run(run.exported) is None


def test_damaged_extras_are_left_out_with_a_warning(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.baseline.write_text('{"unigram')
    record = read_run(run.root)
    assert record is not None
    assert record.baseline == {}
    assert f"{run.baseline} is damaged" in caplog.text
    run.config.write_text("a: [1,")
    with pytest.raises(MapetError, match="is not valid YAML"):
        read_run(run.root)


def test_the_record_of_the_first_model_is_kept(run: RunFolder, tmp_path: Path) -> None:
    later = RunFolder(tmp_path)
    record_origin(later, "vit_tiny_patch16_224")
    assert not later.origin.exists()
    record_origin(later, f"local-dir:{run.exported}")
    kept = later.origin.read_text()
    assert json.loads(kept) == {"run": "photos", **asdict(read_run(run.root))}  # type: ignore[arg-type]
    run.results.write_text("{}")
    record_origin(later, str(run.root))
    assert later.origin.read_text() == kept


def test_paths_are_cut_to_names() -> None:
    found = strip_paths({"a": "/home/me/runs/photos/exported", "b": ["C:\\images\\x.png", 3], "c": "hf-hub:timm/vit"})
    assert found == {"a": "photos", "b": ["x.png", 3], "c": "hf-hub:timm/vit"}
    assert strip_paths("https://me:secret@host.org/a/b.pt?signature=1") == "https://host.org/a/b.pt"


def test_files_nested_too_deep_are_damaged(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    run.results.write_text(deep)
    with run.metrics.open("a") as file:
        file.write(deep + "\n")
    record = read_run(run.root)
    assert record is not None
    assert (record.results, record.last["step"]) == ({}, 149)
    assert "results.json is damaged" in caplog.text
    assert "line 151 of" in caplog.text
    with pytest.raises(MapetError, match="results.json is damaged .*; remove its folder or restore it"):
        read_results(run.root)
    run.baseline.write_text(deep)
    assert measure_baseline([torch.zeros(1, 4, dtype=torch.long)], 2, "loss", run.baseline).entropy == 0
    assert "the baseline is measured again" in caplog.text
