"""Measure what pre-training costs: steps of every objective, memory, peers, loading, tokenizing, k-means.

    python benchmarks/run.py --quick            # within 5 minutes on 2 cores
    python benchmarks/run.py --only steps --models vit_base_patch16_224 --batch-size 256 --compile

Everything that is compared runs in one process in alternating rounds, and ratios are taken within a round, so that a
change in the machine's speed affects both sides. The tables are printed as Markdown and written with ``--json`` too.
"""

import argparse
import contextlib
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mapet.jobs.pretrain.flops import flops_of_image
from mapet.models.networks import build_vit
from mapet.objectives.base import Objective
from mapet.objectives.masking import Mask
from mapet.objectives.registry import OBJECTIVES, build_objective, build_target
from mapet.report.tables import Table
from mapet.tokenizers.kmeans import fit_centroids, nearest_centroid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
CPU_BATCH = {"vit_tiny_patch16_224": 8, "vit_small_patch16_224": 4, "vit_base_patch16_224": 2}
VOCAB = 8192

Step = Callable[..., Tensor]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return seconds by way, in alternating rounds; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            wait()
            began = time.perf_counter()
            way()
            wait()
            if round_number:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(own: list[float], other: list[float]) -> str:
    """Return how many times as fast ``own`` is as ``other``: the median and the extremes of the rounds."""
    ratios = sorted(b / a for a, b in zip(own, other, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def ceiling(precision: str, rounds: int) -> float:
    """Return the operations per second of a square matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 1536
    one, other = (torch.randn(size, size, device=DEVICE, dtype=DTYPES[precision]) for _ in range(2))
    times = timed({"product": lambda: one @ other}, rounds + 2)["product"]
    return 2 * size**3 / min(times)


def make(name: str, model: str, size: int) -> Objective:
    backbone = build_vit(model, image_size=size, layer_scale=0.1, drop_path=0.1)
    target = build_target(name, OBJECTIVES[name].default_targets, backbone, VOCAB, "cosine")
    return build_objective(name, backbone, target)


def count_flops(name: str, model: str, size: int) -> float:
    """Return the operations of one image, forward and backward, counted on the meta device."""
    with torch.device("meta"):
        objective = make(name, model, size)
        ids = torch.zeros(1, objective.patches, dtype=torch.long)
    return flops_of_image(objective, ids)


def step_of(objective: nn.Module, precision: str, *inputs: Any) -> Step:
    """Return a function that takes a step without the optimizer, and draws the mask as training does."""
    parameters = list(objective.parameters())

    def step(backward: bool = True) -> Tensor:
        drawn = [objective.draw_mask(len(inputs[0]), DEVICE)] if hasattr(objective, "draw_mask") else []
        narrow = torch.autocast(DEVICE.type, DTYPES[precision]) if precision != "no" else contextlib.nullcontext()
        with narrow:
            output = objective(*inputs, *drawn)
            loss: Tensor = output["loss"]
        if not backward:
            return loss
        loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return loss

    return step


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = op(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.bytes:
                    self.bytes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.bytes.pop, storage._cdata)
        return made


def kept_bytes(step: Step) -> int:
    """Return the bytes that a step keeps for its backward pass."""
    with Live() as live:
        loss = step(backward=False)
        kept = sum(live.bytes.values())
    del loss
    return kept


def batch_of(count: int, size: int) -> tuple[Tensor, Tensor]:
    patches = (size // 16) ** 2
    images = torch.randn(count, 3, size, size, device=DEVICE)
    return images, torch.randint(0, VOCAB, (count, patches), device=DEVICE)


def steps(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for precision in arguments.precisions:
        most = ceiling(precision, arguments.rounds)
        for model in arguments.models:
            count = arguments.batch_size or CPU_BATCH.get(model, 2)
            inputs = batch_of(count, 224)
            ways: dict[str, Step] = {}
            for name in arguments.objectives:
                objective = make(name, model, 224).to(DEVICE)
                ways[name] = step_of(objective, precision, *inputs)
                if arguments.compile:
                    compiled = make(name, model, 224).to(DEVICE)
                    compiled.forward = torch.compile(compiled.forward, dynamic=False)
                    ways[f"{name}, compiled"] = step_of(compiled, precision, *inputs)
            times = timed(ways, arguments.rounds)
            for name, taken in times.items():
                plain, median = name.partition(",")[0], statistics.median(taken)
                flops = count_flops(plain, model, 224)
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                kept = kept_bytes(ways[name]) if plain == name else None
                yield {
                    "model": model,
                    "objective": name,
                    "precision": precision,
                    "batch": count,
                    "ms": f"{1e3 * median:.1f}",
                    "images/s": f"{count / median:.1f}",
                    "GFLOP an image": f"{flops / 1e9:.2f}",
                    "share of the ceiling": f"{flops * count / median / most:.1%}",
                    "MiB kept an image": "-" if kept is None else f"{kept / count / 2**20:.0f}",
                    "peak GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if DEVICE.type == "cuda" else "-",
                    "speed, MIM = 1": ratio(taken, times["mim"]) if "mim" in times else "-",
                }


def growth(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How MaPeT's step grows from 224 to 448 pixels."""
    model, count = arguments.models[0], 2
    ways = {}
    for size in (224, 448):
        ways[str(size)] = step_of(make("mapet", model, size).to(DEVICE), "no", *batch_of(count, size))
    times = timed(ways, max(2, arguments.rounds // 2))
    flops, kept = ({size: measure(size) for size in ways} for measure in (
        lambda size: count_flops("mapet", model, int(size)), lambda size: kept_bytes(ways[size])
    ))  # fmt: skip
    yield {
        "model": model,
        "time": ratio(times["224"], times["448"]),
        "FLOPs": f"{flops['448'] / flops['224']:.2f}",
        "kept bytes": f"{kept['448'] / kept['224']:.2f}",
    }


class AuthorsWay(nn.Module):
    """MaPeT as its authors compute it, in our words: two streams, a mask for every image and head, plain attention.

    It uses the weights of one of our objectives, and its loss is the same.
    """

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective

    def draw_mask(self, batch: int, device: torch.device) -> Mask:
        return self.objective.draw_mask(batch, device)

    def forward(self, images: Tensor, ids: Tensor, mask: Mask) -> dict[str, Tensor]:
        own, vit = self.objective, self.objective.backbone
        queries, heads = own.rows["queries"], vit.blocks[0].attn.num_heads
        float_mask = torch.zeros(own.visible.shape, device=images.device).masked_fill(~own.visible, float("-inf"))
        masks = float_mask.repeat(len(images), heads, 1, 1).split([len(float_mask) - queries, queries], dim=2)
        content, query = own.embed(images, mask).tensor_split([-queries], dim=1)
        for block in vit.blocks:
            seen = block.norm1(content)
            content, query = (
                x + block.drop_path1(block.ls1(self.attend(block.attn, block.norm1(x), seen, stream_mask)))
                for x, stream_mask in zip((content, query), masks, strict=True)
            )
            content, query = (
                x + block.drop_path2(block.ls2(block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x))))))
                for x in (content, query)
            )
        logits = own.head(vit.norm(query))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.gather(1, mask.target).flatten())}

    def attend(self, attention: Any, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        q_weight, kv_weight = attention.qkv.weight.tensor_split([attention.attn_dim])
        q_bias, kv_bias = attention.qkv.bias.tensor_split([attention.attn_dim])
        q = F.linear(x, q_weight, q_bias).unflatten(-1, (1, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
        k, v = F.linear(seen, kv_weight, kv_bias).unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * attention.scale + mask).softmax(dim=-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2))


def peers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Other ways to the same: the authors' beside MaPeT, BEiT and MAE of transformers beside MIM and MAE."""
    import transformers

    model = arguments.models[0]
    vit = build_vit(model, image_size=224)
    width, depth, heads = vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads
    size: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    size |= {"intermediate_size": 4 * width, "image_size": 224, "patch_size": 16, "attn_implementation": "sdpa"}
    count = arguments.batch_size or CPU_BATCH.get(model, 2)
    images, ids = batch_of(count, 224)
    masked = torch.zeros(count, 196, dtype=torch.bool, device=DEVICE)
    masked[:, :75] = True
    beit = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(**size, vocab_size=VOCAB, use_absolute_position_embeddings=True, use_mask_token=True)
    )
    mae = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**size, norm_pix_loss=True))

    class Peer(nn.Module):
        def __init__(self, network: nn.Module, **inputs: Tensor) -> None:
            super().__init__()
            self.network, self.inputs = network, inputs

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"loss": self.network(images, **self.inputs).loss}

    for name in ("mapet", "mim", "mae"):
        objective = make(name, model, 224).to(DEVICE)
        theirs: dict[str, Any] = {
            "mapet": ("its authors'", AuthorsWay(objective), (images, ids)),
            "mim": ("BEiT of transformers", Peer(beit, bool_masked_pos=masked, labels=ids[masked]), (images,)),
            "mae": ("MAE of transformers", Peer(mae), (images,)),
        }
        title, peer, inputs = theirs[name]
        for precision in arguments.precisions:
            ways = {
                "ours": step_of(objective, precision, images, ids),
                "theirs": step_of(peer.to(DEVICE), precision, *inputs),
            }
            times = timed(ways, arguments.rounds)
            kept = [kept_bytes(way) for way in ways.values()]
            yield {
                "model": model,
                "objective": name,
                "beside": title,
                "precision": precision,
                "speed, theirs = 1": ratio(times["ours"], times["theirs"]),
                "kept bytes, theirs = 1": f"{kept[0] / kept[1]:.2f}",
            }


def tokenizing(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ids of a teacher's features beside the teacher's forward pass alone."""
    images = batch_of(16, 224)[0]
    for model in arguments.models[:2]:
        teacher = build_vit(model, image_size=224).to(DEVICE).eval()
        centroids = torch.randn(VOCAB, teacher.embed_dim, device=DEVICE)

        def features(teacher: Any = teacher) -> Tensor:
            return teacher.forward_features(images)[:, 1:]

        def ids(features: Step = features, centroids: Tensor = centroids) -> Tensor:
            return nearest_centroid(features(), centroids)[0]

        with torch.no_grad():
            times = timed({"teacher": features, "ids": ids}, arguments.rounds)
        yield {"teacher": model, "ids": VOCAB, "time, teacher alone = 1": ratio(times["teacher"], times["ids"])}


def kmeans(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our k-means beside faiss's, both on the CPU: 20 iterations."""
    import faiss

    faiss.omp_set_num_threads(arguments.threads)
    count, vocab = (20_000, 256) if arguments.quick else (200_000, 1024)
    points = F.normalize(torch.randn(count, 192, generator=torch.Generator().manual_seed(0)), dim=1)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = fit_centroids(points, vocab, 0)

    def theirs() -> None:
        fit = faiss.Kmeans(192, vocab, niter=20, min_points_per_centroid=1, max_points_per_centroid=count)
        fit.train(points.numpy())
        found["faiss"] = torch.from_numpy(fit.centroids)

    times = timed({"ours": ours, "faiss": theirs}, 2)
    inertia = {name: float(nearest_centroid(points, centroids)[1].sum()) for name, centroids in found.items()}
    yield {
        "points": count,
        "ids": vocab,
        "speed, faiss = 1": ratio(times["ours"], times["faiss"]),
        "inertia, faiss = 1": f"{inertia['ours'] / inertia['faiss']:.4f}",
    }


SECTIONS = {"steps": steps, "growth": growth, "peers": peers, "tokenizing": tokenizing, "kmeans": kmeans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["mapet", "pim", "mim", "mae", "cae"])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch-size", type=int, help="default: for CPUs, 8, 4 or 2 by model")
    parser.add_argument("--compile", action="store_true", help="also compiled steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="ViT-Ti, two rounds, small k-means")
    parser.add_argument("--json", type=Path, help="a file for the tables")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds = arguments.models[:1], 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {arguments.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}\n", flush=True)
    found = {}
    for name in arguments.only:
        rows = found[name] = list(SECTIONS[name](arguments))
        print(Table(list(rows[0]), [list(map(str, row.values())) for row in rows], name).to_markdown(), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"where": where, "torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
