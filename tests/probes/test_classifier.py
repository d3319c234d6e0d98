import shutil
from pathlib import Path

import pytest
import timm
import torch

from mapet.data.labelled import from_labelled_folder
from mapet.data.views import PlainView
from mapet.probes.classifier import score_classifier

VIEW = PlainView((32, 32), (0.5,), (0.5,))


def test_scores_are_those_of_the_logits_without_damaged_images(digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "in_chans": 1, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    network = timm.create_model("vit_tiny_patch16_224", **small, drop_path_rate=0.5).train()
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "class 4" / "2.png").write_bytes(b"cut")
    images = from_labelled_folder(folder)
    found = score_classifier(network, images, VIEW, 1, device=torch.device("cpu"), batch_size=7)
    assert not network.training
    kept = [i for i, key in enumerate(images.keys) if key != "class 4/2.png"]
    with torch.no_grad():
        logits = network(torch.stack([VIEW(images.load(i, 1))[1] for i in kept]))
    labels = torch.tensor(images.labels)[kept]
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.top5 == pytest.approx(float((logits.topk(5).indices == labels[:, None]).any(1).double().mean()))
    assert found.confusion.sum(1).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]
