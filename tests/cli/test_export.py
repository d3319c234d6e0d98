import json
from pathlib import Path

import pytest
from tests.cli.test_main import refused

from mapet.cli import main


def test_a_run_is_exported(
    pretrained_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(pretrained_run), tmp_path / "out"
    assert main(["export", "timm", run, "--out", str(out / "vit"), "--license", "mit", "--check-images", "9"]) == 0
    assert f"written: {out / 'vit'}, 0.1 MB; largest difference to the model on 9 images of {digits}: 0\n" in (
        capsys.readouterr().err
    )
    assert "license: mit\n" in (out / "vit" / "README.md").read_text()
    program = out / "vit.pt2"
    assert main(["export", "torch", run, "--out", str(program), "--image-size", "28x42", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(program),
        "format": "torch",
        "bytes": program.stat().st_size,
        "input_size": [1, 28, 42],
        "classes": 0,
        "images": 60,
        "checked_on": str(digits),
        "largest_difference": 0,
        "tolerance": 1e-4,
    }
    said = refused(capsys, "export", "onnx", run, "--out", str(out / "vit.onnx"), "--license", "mit")
    assert "unrecognized arguments: --license mit; see mapet export onnx --help" in said
