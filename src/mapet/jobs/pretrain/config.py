"""The configuration of a pre-training run."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from mapet.config.base import CHOSEN, Measured, Scalar, default_of, key
from mapet.config.keys import (
    Count,
    InputKeys,
    KMeansKeys,
    Pixels,
    Share,
    TeacherKeys,
    Text,
    TrainKeys,
    ViewKeys,
    numbers,
    word_or_numbers,
)
from mapet.errors import MapetError

MOST_MODEL_ARGUMENT = 2**14  # a depth or a width

# Arguments of timm's networks that are keys here.
TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "channels",
    "drop_path_rate": "drop_path",
    "init_values": "layer_scale",
}
IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}  # mean and std by channels


class PretrainConfig(TrainKeys, ViewKeys, KMeansKeys, InputKeys):
    """The keys of a pre-training run; ``settle_run`` derives those that depend on the data and the network."""

    init: Text | None = key(
        None,
        "weights to begin with: a run, an exported or converted folder, or the name of a timm model or of one that "
        "comes with mapet; its architecture, sizes and normalisation become the defaults",
        common=True,
        single=True,
    )
    model: str = key("vit_small_patch16_224", "a timm Vision Transformer by name", common=True)
    image_size: Pixels = key(224, "side of the square input in pixels", common=True)
    objective: str = key("mapet", "mapet, pim, mim, raster, cae, mae or simmim", common=True, single=True)
    targets: Literal["ids", "pixels", "features"] = key(
        CHOSEN,
        "what is predicted of a patch: ids (of a tokenizer), pixels, or features (of a frozen --teacher); default: "
        "pixels for mae and simmim, ids for the others",
        common=True,
    )
    tokenizer: Text | None = key(
        CHOSEN,
        "for ids: 'pixels' (the default), a timm or torchvision model name or the exported folder of an earlier run "
        "(k-means over its features), 'dvae' or 'vqkd' (published), or the folder of a fitted tokenizer",
        common=True,
        single=True,
    )
    tokens: Text | None = key(
        None,
        "for ids: a token store of these images (mapet tokenizer encode), instead of tokenizing at each step",
        common=True,
        single=True,
    )
    teacher: Text | None = key(
        None,
        "for features: a timm or torchvision model name or the exported folder of an earlier run, whose patch features "
        "are predicted",
        common=True,
    )
    feature_loss: Literal["cosine", "smooth_l1"] = key("cosine", "for features: how predictions are compared")
    patch_size: Pixels = key(CHOSEN, "side of a patch in pixels; default: the model's")
    drop_path: float = key(0.1, "stochastic depth rate of the last block", ge=0, lt=1)
    layer_scale: float | None = key(0.1, "initial LayerScale; null (flag: none): the model's own", gt=0, le=1e3)
    model_args: dict[str, Scalar] = key({}, "further arguments of timm's VisionTransformer, as depth=4 embed_dim=128")
    mask_ratio: Share = key(CHOSEN, "share of the patches that are targets; default: the objective's (mapet: 0.75)")
    masking: str = key(
        CHOSEN, "how targets are chosen and visited: random, blockwise, cells, raster, spiral; default: the objective's"
    )
    objective_args: dict[str, Scalar] = key({}, "further arguments of the objective, as decoder_depth=2 of mae")
    views: int | None = key(
        None, "distinct crops of each image; default: a new one each epoch, or those of --tokens", ge=1, le=10_000
    )
    color_jitter: Share = key(
        0.4, "jitter of the student's view: brightness, contrast and, of 3 channels only, saturation"
    )
    mean: tuple[float, ...] | Measured = key(
        CHOSEN,
        "input mean per channel; data: mean and deviation of a sample of the images; default: ImageNet's, and data for "
        "channels other than 1 and 3",
    )
    std: tuple[float, ...] | Measured = key(CHOSEN, "input deviation per channel; default: as --mean")
    eval_data: Text | None = key(
        None,
        "labelled images to measure k-NN and a linear probe on: class folders, or a demo set",
        free=True,
        single=True,
    )
    eval_every: Count = key(10, "epochs between evaluations (and one at the end)", free=True, single=True)

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _data_may_be_a_word(cls, value: Any) -> Any:
        return word_or_numbers(value)

    @field_validator("model_args", "objective_args")
    @classmethod
    def _no_absurd_sizes(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, value in (arguments or {}).items():
            if isinstance(value, int) and value > MOST_MODEL_ARGUMENT:
                raise ValueError(f"{name} is {value}; take at most {MOST_MODEL_ARGUMENT}")
            if name in TIMM_ARGUMENTS:
                raise ValueError(f"{name} has a flag of its own: use --{TIMM_ARGUMENTS[name].replace('_', '-')}")
        return arguments

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse values that do not go together."""
        super().check_together(given)
        std = given.get("std")
        if std is not None and not isinstance(std, Measured) and min(std, default=0) <= 0:
            raise ValueError("std must be positive")
        if given.get("mirror") and given.get("views") is None and given.get("tokens") is None:
            raise ValueError("mirror needs views: without a fixed number of views each is drawn anew, flip included")

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Fill in what follows from data, objective, network and token store.

        Args:
            given: by the user, completed by what ``init`` decides.
            facts: those of ``TrainKeys.choose``; ``published``: the objective's own ``targets``, ``masking`` and
                ``mask_ratio``; ``patch_size`` of the network; ``vocab_size`` of a tokenizer that is fitted, or None;
                ``view``: settings of the token store's views, empty without one.
        """
        view = facts["view"]
        channels = given.get("channels", default_of(cls, "channels"))
        either = Measured.DATA in (given.get("mean"), given.get("std"))
        mean, std = (Measured.DATA, Measured.DATA) if either else IMAGENET.get(channels, (Measured.DATA, Measured.DATA))
        chosen = {name: given.get(name, value) for name, value in facts["published"].items()}
        ids_online = chosen["targets"] == "ids" and given.get("tokens") is None
        chosen |= {
            "tokenizer": given.get("tokenizer") or ("pixels" if ids_online else None),
            "vocab_size": facts["vocab_size"] if chosen["targets"] == "ids" else None,
            "patch_size": facts["patch_size"],
            "mean": given.get("mean", mean),
            "std": given.get("std", std),
        }
        for name in ("mean", "std"):
            if not isinstance(chosen[name], Measured) and len(chosen[name]) != channels:
                raise MapetError(f"{name} has {len(chosen[name])} values for {channels} channel(s); give one for each")
        return {
            **super().choose(given, **facts),
            **ViewKeys.choose({**given, **view}),
            **{name: value for name, value in view.items() if name in ("views", "value_range")},
            **chosen,
        }


def input_of(config: PretrainConfig) -> dict[str, Any]:
    """Return what an export says of the network's input, of a configuration whose numbers are measured."""
    mean, std, value_range = numbers(config.mean), numbers(config.std), config.value_range
    return {"mean": mean, "std": std, "value_range": value_range and numbers(value_range)}


def check_targets(given: Mapping[str, Any], objective: str, targets: str) -> None:
    """Refuse keys that do not go with what an objective predicts.

    Raises:
        MapetError: naming the keys.
    """
    if targets == "features" and given.get("teacher") is None:
        raise MapetError("targets is 'features', but there is no teacher; name one with --teacher")
    if targets != "features" and given.get("teacher") is not None:
        raise MapetError("teacher is for targets 'features'; add --targets features, or name it as --tokenizer")
    keys = {"tokenizer", "tokens", *KMeansKeys.model_fields} if targets != "ids" else set()
    if targets == "features" or given.get("tokenizer") not in (None, "pixels"):
        keys -= set(TeacherKeys.model_fields)
    elif targets == "ids" and given.get("tokens") is None:
        keys = set(TeacherKeys.model_fields)
    if said := sorted(name for name in keys if given.get(name) is not None):
        what = "have no teacher" if targets == "ids" else "need no token ids"
        raise MapetError(f"objective {objective!r} predicts {targets}, which {what}; leave out {', '.join(said)}")
