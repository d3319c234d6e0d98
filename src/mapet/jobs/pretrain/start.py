"""Where continued pre-training begins: an earlier run, an exported or converted folder, or a timm model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.base import read_recipe
from mapet.engine.checkpoint import read_state
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError
from mapet.inference.models import open_model
from mapet.jobs.convert.run import PRETRAINING_FILE
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.models.attention import use_layouts
from mapet.models.tensors import read_tensors
from mapet.objectives.base import Objective
from mapet.objectives.registry import find_objective
from mapet.targets.sources import NoTokens
from mapet.targets.tokenizer import is_ready
from mapet.tokenstore.store import TokenStore

logger = logging.getLogger(__name__)

# Arguments of timm's ViT that have a key of their own, or that every pre-training sets by itself.
_SET_OTHERWISE = {
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
# Change no weight and no output of the network that comes out, so a new run may choose them.
_DROPOUT = {"attn_drop_rate", "pos_drop_rate", "proj_drop_rate"}
# What comes after the blocks' last norm, and serves a classifier.
_AFTER_NORM = ("fc_norm.", "attn_pool.", "head.", "head_drop.")
_PARTS = ("mask_token", "head.weight", "head.bias")


def inherit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a configuration by what its ``init`` decides: the network's architecture, size and normalisation.

    With ``init_parts = all`` a run's objective, its arguments and its tokenizer as well. Channels and image size may
    differ.

    Args:
        values: configuration by key, as given; see ``PretrainConfig``.

    Raises:
        MapetError: if the source cannot be had, is not a plain ViT, or something given contradicts it.
    """
    values = dict(values)
    init = values.get("init")
    if not isinstance(init, str) or not init:
        return values
    opened = open_model(init, reinit=True)  # its architecture alone: the weights are read once all else is settled
    try:
        network = use_layouts(opened.network)
    except MapetError as error:
        raise MapetError(f"init {init!r} cannot be pre-trained further: {error}") from error
    recorded = {key: value for key, value in network.pretrained_model_args.items() if key not in _SET_OTHERWISE}
    patch, has_scale = network.patch_embed.patch_size, any(".ls1." in key for key in network.state_dict())
    source: dict[str, Any] = {
        "model": network.pretrained_cfg["architecture"],
        "patch_size": patch[0],
        "layer_scale": network.pretrained_model_args.get("init_values"),
        "model_args": {key: value for key, value in recorded.items() if value is not None},
    }

    for key in ("model", "patch_size"):
        given = values.get(key)
        if given is not None and (given.split(".")[0] if isinstance(given, str) else given) != source[key]:
            raise _contradiction(key, given, init, source[key])
    if "layer_scale" in values and (values["layer_scale"] is not None) != has_scale:
        raise _contradiction("layer_scale", values["layer_scale"], init, source["layer_scale"] or has_scale or None)
    given_args = values.get("model_args") or {}
    for key, given in given_args.items() if isinstance(given_args, Mapping) else ():
        if key not in _DROPOUT and (key not in recorded or recorded[key] != given):
            raise _contradiction(f"model_args {key}", given, init, recorded.get(key, "the model's own"))
    if isinstance(given_args, Mapping):
        values["model_args"] = source["model_args"] | dict(given_args)

    values |= {key: source[key] for key in ("model", "patch_size", "layer_scale")}
    values.setdefault("channels", opened.channels)
    if values.get("image_size") is None:
        rows, columns = opened.view.size
        if rows != columns:
            raise MapetError(
                f"init {init!r} takes images of {rows} x {columns} pixels, and pre-training takes squares; pass "
                "--image-size, and its position embeddings are resized"
            )
        values["image_size"] = rows
    if values["channels"] == opened.channels:
        for key, of_source in (("mean", opened.view.mean), ("std", opened.view.std)):
            if values.get(key) is None:
                values[key] = of_source
    if values.get("init_parts") != "all":
        return values
    return values | _of_run(values, RunFolder(init))


def _of_run(values: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Return a source run's objective and tokenizer, where nothing else is asked for."""
    found: dict[str, Any] = {}
    if "objective" not in values and folder.config.is_file():
        recorded = read_recipe(folder.config)
        found["objective"] = recorded.get("objective", "mapet")
        if "objective_args" not in values:
            found["objective_args"] = recorded.get("objective_args", {})
    needs_ids = find_objective(str((values | found).get("objective", "mapet"))).needs_ids
    if needs_ids and values.get("tokenizer") is None and values.get("tokens") is None and folder.tokenizer.is_dir():
        found["tokenizer"] = str(folder.tokenizer)
    return found


def _contradiction(key: str, given: object, init: str, source: object) -> MapetError:
    return MapetError(
        f"{key} = {given!r} is asked for, but in init {init!r} it is {source!r}; leave it out to take over that network"
    )


@dataclass(frozen=True)
class Start:
    """Weights that a run begins with.

    Attributes:
        name: of their source, as the user called it.
        weights: of the backbone, for the run's image size and channels.
        pretraining: mask vector, head and what else an objective has; empty if they are to begin anew.
        tokenizer_hash: of the tokenizer whose ids the head predicts, or what stands for none; None where it is unknown.
    """

    name: str
    weights: Mapping[str, Tensor]
    pretraining: Mapping[str, Tensor] = field(default_factory=dict)
    tokenizer_hash: str | None = None

    def load_backbone(self, backbone: VisionTransformer, model: str) -> None:
        """Put the weights into a backbone; say what it lacks of them, and they of it.

        Raises:
            MapetError: if they do not fit.
        """
        wanted = backbone.state_dict()
        for name in (name for name in wanted if name in self.weights):
            here, there = tuple(self.weights[name].shape), tuple(wanted[name].shape)
            if here != there:
                raise MapetError(
                    f"init {self.name!r} does not fit model {model!r}: {name!r} is {here} in the one and {there} in "
                    "the other"
                )
        left_out = [name for name in self.weights if name not in wanted]
        missing = [name for name in wanted if name not in self.weights]
        # A classifier that pools before its norm has no norm of tokens.
        anew = [name for name in missing if name.startswith("norm.") and "fc_norm.weight" in left_out]
        strange = [name for name in left_out if not name.startswith(_AFTER_NORM)]
        lacking = [name for name in missing if name not in anew]
        if strange or lacking:
            one, other = (self.name, model) if strange else (model, self.name)
            raise MapetError(
                f"init {self.name!r} does not fit model {model!r}: {one!r} has {(strange or lacking)[0]!r}, which "
                f"{other!r} lacks ({len(strange) + len(lacking)} tensors differ)"
            )
        backbone.load_state_dict({name: self.weights.get(name, initial) for name, initial in wanted.items()})
        logger.info(
            "begins with the weights of %s; not taken over: %s; begun anew: %s",
            self.name,
            ", ".join(left_out) or "nothing",
            ", ".join(anew) or "nothing",
        )

    def check_parts(self, objective: Objective) -> None:
        """Refuse an objective of other parts than the source has; how many ids there are is checked later.

        Raises:
            MapetError: if parts are missing, left over, or of other shapes.
        """
        if not self.pretraining:
            return
        there = self.pretraining
        here = {name: part.shape for name, part in objective.state_dict().items() if not name.startswith("backbone.")}
        ids = objective.needs_ids
        if ids:  # as many as the source has
            count = there["head.weight"].shape[:1]
            here |= {name: count + here[name][1:] for name in ("head.weight", "head.bias")}
        differing = [name for name in {**here, **there} if name not in there or here.get(name) != there[name].shape]
        if not ids and self.tokenizer_hash != NoTokens.tokenizer_hash:
            differing.append("head.weight")  # of ids, though there may be as many as a patch has pixels
        if not differing:
            return
        name, kind = differing[0], type(objective).__name__
        how = f"is not that of this {kind}"
        if name in here and name in there and here[name] != there[name].shape:
            how = f"has shape {tuple(there[name].shape)} instead of {tuple(here[name])} as this {kind}'s"
        raise MapetError(
            f"init_parts all takes over all parts of {self.name!r}, but its {name!r} {how}; take its objective and "
            "objective arguments, or --init-parts backbone"
        )

    def check_ids(self, tokenizer_hash: str, vocab_size: int) -> None:
        """Refuse ids that the head was not trained for.

        Raises:
            MapetError: if another tokenizer makes them.
        """
        if not self.pretraining:
            return
        head = len(self.pretraining["head.weight"])
        if self.tokenizer_hash not in (None, tokenizer_hash) or head != vocab_size:
            what = f"one of {head} ids, not {vocab_size}" if head != vocab_size else "another one than this"
            raise MapetError(
                f"init_parts all takes over the head of {self.name!r}, whose tokenizer is {what}; leave --tokenizer "
                "and --tokens out to take over a run's tokenizer, or take --init-parts backbone"
            )
        if self.tokenizer_hash is None:
            logger.warning("nothing tells which tokenizer the head of %s was trained with; it must be this", self.name)

    def load_rest(self, objective: Objective) -> None:
        """Put mask vector, head and what else there is into the objective."""
        if self.pretraining:
            objective.load_state_dict(self.pretraining, strict=False)


def read_start(config: PretrainConfig) -> Start:
    """Read the weights that ``config.init`` names, for the image size and channels of the run.

    Raises:
        MapetError: if they cannot be had, are not finite, or hold no mask vector and head that are asked for.
    """
    assert config.init is not None
    opened = open_model(config.init, image_size=(config.image_size, config.image_size))
    network: Any = opened.network
    weights, tokenizer_hash = network.state_dict(), None
    embedding = weights["patch_embed.proj.weight"]
    pretraining: dict[str, Tensor] = {}
    if config.init_parts == "all":
        needs_ids = find_objective(config.objective).needs_ids
        if needs_ids and config.tokens is None and not is_ready(config.tokenizer or "pixels"):
            raise MapetError(
                f"init_parts all takes over the head of {config.init!r}, which predicts the ids of the tokenizer that "
                "it was trained with; name that with --tokenizer or --tokens, or take --init-parts backbone"
            )
        own, pretraining, tokenizer_hash = _read_parts(config.init)
        side = network.pretrained_cfg["input_size"][-1]  # before it was resized
        if own and side != config.image_size:
            raise MapetError(
                f"init {config.init!r} was pre-trained at {side} px, this run is to be at {config.image_size} px: the "
                "head would predict ids of another grid; leave --image-size out, or take --init-parts backbone"
            )
        weights = own or weights  # of one moment with the head
        embedding = weights["patch_embed.proj.weight"]
    weights |= {"patch_embed.proj.weight": adapt_input_conv(config.channels, embedding, base_chans=opened.channels)}
    return Start(config.init, weights, pretraining, tokenizer_hash)


def _read_parts(init: str) -> tuple[dict[str, Tensor], dict[str, Tensor], str | None]:
    """Return what a run or a converted folder has of backbone, mask vector and head, and the tokenizer's hash."""
    run, converted = RunFolder(init), Path(init.removeprefix("local-dir:")) / PRETRAINING_FILE
    file = converted if converted.is_file() else run.checkpoint / "objective.safetensors"
    if not file.is_file():
        raise MapetError(
            f"init {init!r} holds no mask vector and head; name a pre-training run or a folder made by mapet convert "
            "upstream, or take --init-parts backbone"
        )
    tensors, _ = read_tensors(file)
    lacking = [name for name in _PARTS if name not in tensors]
    if lacking:
        raise MapetError(
            f"{file} is not of a pre-training run, for it lacks {lacking[0]!r}; take --init-parts backbone"
        )
    strange = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if strange:
        raise MapetError(f"{file} holds {strange[0]!r} as integers, not floats; take another source")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise MapetError(f"{file} contains NaN or infinity (first {broken[0]!r}); take another source")
    backbone = {
        name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")
    }
    rest = {name: value for name, value in tensors.items() if not name.startswith("backbone.")}
    return backbone, rest, None if file == converted else _tokenizer_hash(run)


def _tokenizer_hash(run: RunFolder) -> str:
    """Return the content hash of the tokenizer that a run was trained with."""
    store = read_recipe(run.config).get("tokens")
    if store is not None:
        return TokenStore.open(str(store)).header.tokenizer_hash
    return read_state(run.checkpoint).made_from.targets
