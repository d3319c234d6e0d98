"""Where continued pre-training begins: an earlier run, an exported or converted folder, or a timm model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.base import default_of, read_recipe
from mapet.engine.checkpoint import TASK_FILE, read_state
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError
from mapet.inference.models import open_model
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.models.attention import use_layouts
from mapet.models.tensors import read_tensors
from mapet.models.upstream import PRETRAINING_FILE
from mapet.objectives.base import Objective
from mapet.objectives.registry import find_objective
from mapet.targets.sources import TargetSource
from mapet.targets.tokenizer import is_ready
from mapet.tokenstore.store import TokenStore

logger = logging.getLogger(__name__)

# Arguments of timm's ViT that are keys of the configuration, or that every pre-training sets by itself.
SET_OTHERWISE = {
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "fc_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "num_classes",
    "patch_size",
    "pos_drop_rate",
    "proj_drop_rate",
}
# Arguments that change no weight and no output of the exported network, so a new run may choose them.
DROPOUT = {"attn_drop_rate", "pos_drop_rate", "proj_drop_rate"}
# Keys that a run's mask vector and head belong to.
OF_OBJECTIVE = ("objective", "objective_args", "targets", "teacher", "teacher_stage", "teacher_size", "feature_loss")
# Parts after the last norm of the blocks: they serve a classifier.
AFTER_NORM = ("fc_norm.", "attn_pool.", "head.", "head_drop.")


def inherit(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the given values by what ``init`` decides: the network's architecture, size and normalisation.

    With ``init_parts = all`` also a run's objective, its arguments and its tokenizer. Channels and image size may
    differ.

    Raises:
        MapetError: if the source cannot be had, is not a plain ViT, or a given value contradicts it.
    """
    values = dict(given)
    init = values.get("init")
    if init is None:
        return values
    opened = open_model(init, reinit=True)  # the architecture alone: weights are read once all else is settled
    try:
        network = use_layouts(opened.network)
    except MapetError as error:
        raise MapetError(f"init {init!r} cannot be pre-trained further: {error}") from error
    recorded = {key: value for key, value in network.pretrained_model_args.items() if value is not None}
    arguments = {key: value for key, value in recorded.items() if key not in SET_OTHERWISE}
    has_scale = any(".ls1." in key for key in network.state_dict())
    source: dict[str, Any] = {
        "model": network.pretrained_cfg["architecture"],
        "patch_size": network.patch_embed.patch_size[0],
        "layer_scale": recorded.get("init_values"),
    }
    asked = {key: values[key] for key in ("model", "patch_size") if key in values}
    if "model" in asked:
        asked["model"] = asked["model"].split(".")[0]
    wrong: list[tuple[str, Any, Any]] = [(key, values[key], source[key]) for key in asked if asked[key] != source[key]]
    if "layer_scale" in values and (values["layer_scale"] is not None) != has_scale:
        wrong.append(("layer_scale", values["layer_scale"], source["layer_scale"] or has_scale or None))
    own = values.get("model_args", {})
    wrong += [
        (f"model_args {key}", value, arguments.get(key, "the model's own"))
        for key, value in own.items()
        if key not in DROPOUT and arguments.get(key) != value
    ]
    for key, value, there in wrong:
        raise MapetError(
            f"{key} = {value!r} is asked for, but in init {init!r} it is {there!r}; leave it out to take that network"
        )
    rows, columns = opened.view.size
    if rows != columns and "image_size" not in values:
        raise MapetError(
            f"init {init!r} takes images of {rows} x {columns} pixels, and pre-training takes squares; pass "
            "--image-size, and its position embeddings are resized"
        )
    inherited: dict[str, Any] = {"channels": opened.channels, "image_size": rows}
    if values.get("channels", opened.channels) == opened.channels:
        inherited |= {"mean": opened.view.mean, "std": opened.view.std}
    values = {**inherited, **values, **source, "model_args": arguments | own}
    return values if values.get("init_parts") != "all" else _of_run(RunFolder(init), values) | values


def _of_run(folder: RunFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source run's objective, and where its targets come from, as far as nothing else is asked for."""
    found: dict[str, Any] = {}
    if "objective" not in given and folder.config.is_file():
        recorded = read_recipe(folder.config)
        found = {key: recorded[key] for key in OF_OBJECTIVE if recorded.get(key) and key not in given}
    name = given.get("objective", found.get("objective", default_of(PretrainConfig, "objective")))
    targets = given.get("targets", found.get("targets", find_objective(name).default_targets))
    if targets == "ids" and not {"tokenizer", "tokens"} & given.keys() and folder.tokenizer.is_dir():
        found["tokenizer"] = str(folder.tokenizer)
    return found


@dataclass(frozen=True)
class Start:
    """Weights that a run begins with.

    Attributes:
        name: of their source, as the user called it.
        weights: of the backbone, for the run's image size and channels.
        parts: mask vector, head and other parts of the objective; empty if they are drawn anew.
        tokenizer_hash: of what made the targets that the head predicts; None where it is unknown.
    """

    name: str
    weights: Mapping[str, Tensor]
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    tokenizer_hash: str | None = None

    def load_backbone(self, backbone: VisionTransformer, model: str) -> None:
        """Load the weights; log which tensors were not taken over and which are drawn anew.

        Raises:
            MapetError: if they do not fit.
        """
        wanted = backbone.state_dict()
        left_out = [name for name in self.weights if name not in wanted]
        missing = [name for name in wanted if name not in self.weights]
        # A classifier that pools before its norm has no norm of tokens.
        anew = [name for name in missing if name.startswith("norm.") and "fc_norm.weight" in left_out]
        differing = [
            *(name for name in left_out if not name.startswith(AFTER_NORM)),
            *(name for name in missing if name not in anew),
            *(name for name in wanted if name not in missing and self.weights[name].shape != wanted[name].shape),
        ]
        if differing:
            raise MapetError(
                f"init {self.name!r} does not fit model {model!r}: {differing[0]!r} is missing in one of them or has "
                f"another shape ({len(differing)} tensors differ)"
            )
        backbone.load_state_dict({name: self.weights.get(name, initial) for name, initial in wanted.items()})
        logger.info(
            "begins with the weights of %s; not taken over: %s; drawn anew: %s",
            self.name,
            ", ".join(left_out) or "nothing",
            ", ".join(anew) or "nothing",
        )

    def load_parts(self, objective: Objective, source: TargetSource) -> None:
        """Load mask vector, head and other parts, if they were asked for.

        Raises:
            MapetError: if the objective has other parts, or the head predicts the values of another source.
        """
        if not self.parts:
            return
        if self.tokenizer_hash not in (None, source.tokenizer_hash):
            raise MapetError(
                f"init_parts all takes over the head of {self.name!r}, which was trained for another tokenizer or "
                "teacher; leave --tokenizer, --tokens and --teacher out to take over the run's, or take --init-parts "
                "backbone"
            )
        if self.tokenizer_hash is None:
            logger.warning(
                "init %s does not record its tokenizer; its head fits only the tokenizer that it was trained with",
                self.name,
            )
        own = {name: part.shape for name, part in objective.state_dict().items() if not name.startswith("backbone.")}
        for name in {**own, **self.parts}:
            if name not in own or name not in self.parts or own[name] != self.parts[name].shape:
                there = tuple(self.parts[name].shape) if name in self.parts else "missing"
                raise MapetError(
                    f"init_parts all takes over all parts of {self.name!r}, but its {name!r} is {there} and this "
                    f"{type(objective).__name__}'s is {tuple(own[name]) if name in own else 'missing'}; take its "
                    "objective, its arguments and its tokenizer, or --init-parts backbone"
                )
        objective.load_state_dict(self.parts, strict=False)


def read_start(config: PretrainConfig) -> Start:
    """Read the weights that ``config.init`` names, for the image size and channels of the run.

    Raises:
        MapetError: if they cannot be had, are not finite, or hold no mask vector and head that are asked for.
    """
    init = str(config.init)
    opened = open_model(init, image_size=(config.image_size, config.image_size))
    network: Any = opened.network
    weights, parts, tokenizer_hash = network.state_dict(), dict[str, Tensor](), None
    if config.init_parts == "all":
        if config.targets == "ids" and config.tokens is None and not is_ready(config.tokenizer or ""):
            raise MapetError(
                f"init_parts all takes over the head of {init!r}, which predicts the ids of the tokenizer that it was "
                "trained with; name that with --tokenizer or --tokens, or take --init-parts backbone"
            )
        own, parts, tokenizer_hash = _read_parts(init)
        side = network.pretrained_cfg["input_size"][-1]  # before it was resized
        if own and side != config.image_size:
            raise MapetError(
                f"init {init!r} was pre-trained at {side} px, this run is to be at {config.image_size} px: the head "
                "would predict another grid; leave --image-size out, or take --init-parts backbone"
            )
        weights = own or weights  # of the same moment as the head
    embedding = adapt_input_conv(config.channels, weights["patch_embed.proj.weight"], base_chans=opened.channels)
    return Start(init, weights | {"patch_embed.proj.weight": embedding}, parts, tokenizer_hash)


def _read_parts(init: str) -> tuple[dict[str, Tensor], dict[str, Tensor], str | None]:
    """Return backbone, mask vector and head of a run or a converted folder, and the hash of what made its targets."""
    run, converted = RunFolder(init), Path(init.removeprefix("local-dir:")) / PRETRAINING_FILE
    file = converted if converted.is_file() else run.checkpoint / TASK_FILE
    if not file.is_file():
        raise MapetError(
            f"init {init!r} holds no mask vector and head; name a pre-training run or a folder made by mapet convert "
            "upstream, or take --init-parts backbone"
        )
    tensors, _ = read_tensors(file)
    if "mask_token" not in tensors or "head.weight" not in tensors:
        raise MapetError(
            f"{file} is not of a pre-training run: it lacks mask vector or head; take --init-parts backbone"
        )
    broken = [name for name, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.isfinite().all()]
    if broken:
        raise MapetError(f"{file} is damaged ({broken[0]!r} holds other than finite floats); take another source")
    backbone = {name[9:]: value for name, value in tensors.items() if name.startswith("backbone.")}
    parts = {name: value for name, value in tensors.items() if not name.startswith("backbone.")}
    return backbone, parts, None if file == converted else _tokenizer_hash(run)


def _tokenizer_hash(run: RunFolder) -> str:
    store = read_recipe(run.config).get("tokens")
    if store is not None:
        return TokenStore.open(str(store)).header.tokenizer_hash
    return read_state(run.checkpoint).made_from.targets
