from pathlib import Path

import pytest

from mapet.cli import load_verb, main
from mapet.cli.flags import build_parser, given_values


def test_bad_input_is_one_sentence_and_leaves_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")

    def refused(*arguments: str) -> str:
        assert main(["compare", *arguments, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.startswith("mapet: error: ")
        return said

    small = (str(digits), "--config", "demo")
    assert "neither a folder" in refused(str(tmp_path / "none"), "--config", "demo")
    assert "did you mean 'mim'" in refused(*small, "--objectives", "mimm")
    assert "'mim' is named twice" in refused(*small, "--objectives", "mim,mim")
    assert "--arms takes KEY=VALUE" in refused(*small, "--arms", "half")
    assert "a codebook of 4096 ids needs" in refused(*small, "--objectives", "mim", "--vocab-size", "4096")
    assert "unrecognized arguments: --init runs/a" in refused(*small, "--init", "runs/a")
    assert "not allowed with argument --resume" in refused("--resume", "--join")
    assert not Path(out).exists()


def test_flags_of_comparison_and_pre_training_are_read() -> None:
    verb = load_verb("compare")
    flags = "data --out o --config demo --objectives mapet,mim random --epochs 2 --finetune labels_per_class=10 lr=1e-3"
    parsed = build_parser("compare", verb).parse_args([*flags.split(), "--arms", "half={objective: mapet}"])
    values = given_values(parsed, *verb.configs)
    assert values["objectives"] == ["mapet", "mim", "random"]
    assert (values["epochs"], values["image_size"]) == ("2", 28)
    assert "steps" not in values
    config = verb.configs[0](data="data", finetune=values["finetune"], arms=values["arms"])
    assert config.model_dump(include={"finetune", "arms"}) == {
        "finetune": {"labels_per_class": 10, "lr": 1e-3},
        "arms": {"half": {"objective": "mapet"}},
    }
