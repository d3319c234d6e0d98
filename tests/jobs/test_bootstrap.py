from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tests.conftest import TINY

from mapet import MapetError, load_tokenizer
from mapet.jobs.bootstrap.run import bootstrap
from mapet.tokenizers.kfeatures import KFeatures
from mapet.tokenizers.kpixels import KPixels

QUIET = Console(quiet=True)


def test_each_round_predicts_what_the_last_one_learned(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 10}
    first, second, third = bootstrap(values, tmp_path / "boot", rounds=2, block=0, console=QUIET)
    kinds = [type(load_tokenizer(result.folder.tokenizer)) for result in (first, second, third)]
    assert kinds == [KPixels, KFeatures, KFeatures]
    images = torch.rand(2, 1, 28, 28)
    for teacher, student in ((first, second), (second, third)):
        tokenizer = load_tokenizer(student.folder.tokenizer)
        backbone = teacher.objective.backbone.eval()
        normalised = (images - torch.tensor(teacher.config.input_mean)) / torch.tensor(teacher.config.input_std)
        expected = backbone.forward_intermediates(normalised, indices=[0], intermediates_only=True)[0]
        assert torch.allclose(tokenizer.features(images), expected.flatten(2).mT, atol=1e-5)
    # Done rounds are passed over, one that is not is continued, and the teacher is in the tokenizer.
    shutil.rmtree(third.folder.root)
    again = bootstrap(values, tmp_path / "boot", rounds=2, block=0, resume=True, console=QUIET)
    same = [result.objective.state_dict() for result in (third, again[-1])]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


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


def test_bad_input(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="rounds is 0"):
        bootstrap({**TINY, "data": str(digits)}, tmp_path / "boot", rounds=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(MapetError, match=f"{tmp_path / 'mine'} holds 'letter.txt', no round; choose a new folder"):
        bootstrap({**TINY, "data": str(digits)}, tmp_path / "mine", console=QUIET)
    with pytest.raises(MapetError, match="leave --tokens out"):
        bootstrap({**TINY, "data": str(digits), "tokens": "x"}, tmp_path / "boot")
    with pytest.raises(MapetError, match="block is 7, but the network has 2: take 0 to 1"):
        bootstrap({**TINY, "data": str(digits), "steps": 2}, tmp_path / "boot", block=7, console=QUIET)
