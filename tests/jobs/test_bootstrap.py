import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tests.conftest import TINY

from mapet import MapetError, load_tokenizer
from mapet.jobs.bootstrap.run import bootstrap

QUIET = Console(quiet=True)


def test_each_round_predicts_features_of_the_previous_round(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 10}
    results = bootstrap(values, tmp_path / "boot", rounds=2, block=0, console=QUIET)
    assert [load_tokenizer(result.folder.tokenizer).kind for result in results] == ["pixels", "features", "features"]
    images = torch.rand(2, 1, 28, 28)
    for teacher, student in ((results[0], results[1]), (results[1], results[2])):
        normalised = (images - torch.tensor(teacher.config.mean)) / torch.tensor(teacher.config.std)
        network = teacher.task.outcome().eval()
        expected = network.forward_intermediates(normalised, indices=[0], intermediates_only=True)[0]
        features = load_tokenizer(student.folder.tokenizer).features(images)
        assert torch.allclose(features, expected.flatten(2).mT, atol=1e-5)
    # Finished rounds are kept, and the missing one is run again.
    shutil.rmtree(results[2].folder.root)
    again = bootstrap(values, tmp_path / "boot", rounds=2, block=0, resume=True, console=QUIET)
    one, two = (result.task.state_dict() for result in (results[2], again[2]))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command(processes: int, digits: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "boot"
    recipe.write_text(yaml.safe_dump({**TINY, "data": str(digits), "steps": 2}))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if processes == 2 else []
    command = [sys.executable, "-m", *launcher, "mapet", "bootstrap", "--config", str(recipe), "--out", str(out)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert [Path(each["folder"]).name for each in rounds] == ["round0", "round1"]
    assert [each["tokenizer"] for each in rounds] == ["pixels", str(out / "round0" / "exported")]
    state = json.loads((out / "round1" / "checkpoints" / "last" / "state.json").read_text())
    assert state["made_from"]["processes"] == processes


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"rounds": 0}, "rounds is 0"),
        ({}, {"block": 7}, "block is 7, but the network has 2: take 0 to 1"),
        ({"tokens": "x"}, {}, "leave --tokens out"),
        ({"init": "x"}, {}, "leave --init out"),
        ({"objective": "mae", "vocab_size": None}, {}, "'mae' predicts pixels, not token ids"),
    ],
)
def test_wrong_input_is_refused(
    change: dict[str, Any], options: dict[str, Any], message: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(MapetError, match=message):
        bootstrap({**TINY, "data": str(digits), "steps": 2, **change}, tmp_path / "boot", console=QUIET, **options)
    assert not (tmp_path / "boot").exists()
