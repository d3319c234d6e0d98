"""Types of keys, and groups of keys that several configurations share."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from mapet.config.base import CHOSEN, Config, Measured, default_of, from_text, key
from mapet.errors import MapetError

# Upper bounds are far above what is of use, and below what would fail late, or overflow.
Pixels = Annotated[int, Field(ge=1, le=4096)]
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=10**6)]
VocabSize = Annotated[int, Field(ge=2, le=2**20)]
LearningRate = Annotated[float, Field(gt=0, le=1e3)]
LeastRate = Annotated[float, Field(ge=0, le=1e3)]
WeightDecay = Annotated[float, Field(ge=0, le=1e3)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Channels = Annotated[int, Field(ge=1, le=1024)]
OneOrThree = Annotated[Literal[1, 3], BeforeValidator(from_text)]
# YAML reads a bare no as false.
NoIsAWord = BeforeValidator(lambda value: "no" if value is False else value)

# Limits of an image. Pillow refuses more pixels by itself.
MAX_PIXELS, MAX_BYTES = 178_956_970, 2**30

KNN_TEMPERATURE = 0.07  # of Wu et al. (1805.01978) and DINO

# The default batch size leaves an epoch at least ten steps; the default learning rate counts smaller
# batches as 32.
LEAST_STEPS_PER_EPOCH, LEAST_SCALED_BATCH = 10, 32


class DataKeys(Config):
    """Which images, and how they are read."""

    data: Text = key(  # a resumed run is held to the fingerprint of its images instead
        ...,
        "a folder of images (nested, unlabelled) or of tar files, a text file of paths, s3://BUCKET/PREFIX, hf:NAME, "
        "or a demo set (mnist, fashion-mnist); see docs/data.md",
        common=True,
        free=True,
    )
    seed: int = key(0, "seed of everything that is random", common=True, single=True, ge=0, lt=2**63)
    max_damaged: Share = key(0.1, "stop when more than this share of the images cannot be read", free=True)
    max_pixels: int = key(
        MAX_PIXELS,
        "images with more rows times columns count as damaged; at most the default, which is Pillow's limit",
        free=True,
        ge=1,
        le=MAX_PIXELS,
    )
    max_bytes: int = key(MAX_BYTES, "image files with more bytes count as damaged", free=True, ge=1, le=2**40)
    workers: int | None = key(
        None, "processes that load images; default: chosen by cores and device", free=True, ge=0, le=1024
    )


class InputKeys(DataKeys):
    """What the networks get."""

    channels: Channels = key(
        3,
        "channels of the images: 1 (grey) and 3 (RGB) are converted into each other; other numbers are those of RGBA "
        "images (4), of the pages or bands of TIFF files, or of .npy arrays",
    )
    value_range: tuple[float, ...] | Measured | None = key(
        None,
        "of images with more than 8 bits: the values that become black and white, as 0 4095; values outside are "
        "clipped; data: the least and the greatest value of a sample; default: each image is stretched from its own "
        "least to its own greatest value",
    )

    @field_validator("value_range", mode="before")
    @classmethod
    def _data_is_a_word(cls, value: Any) -> Any:
        return word_or_numbers(value)

    @field_validator("value_range")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Measured) else ordered_range(value)


def word_or_numbers(value: Any) -> Any:
    """Return the word of a list of one word: a flag that takes several numbers gives a list."""
    return value[0] if isinstance(value, list | tuple) and list(value) == [Measured.DATA.value] else value


def ordered_range(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return a value range.

    Raises:
        ValueError: if it is not two rising numbers that float32 can subtract.
    """
    if len(values) != 2 or not 0 < values[1] - values[0] < 1e38:
        raise ValueError("write two numbers, the lower one first")
    return values


def numbers(values: tuple[float, ...] | Measured) -> tuple[float, ...]:
    """Return numbers that are settled, so that they are measured."""
    assert not isinstance(values, Measured)
    return values


class NetworkKeys(Config):
    """A trained model, and the size of its input."""

    model: Text = key(
        ...,
        "a run folder, an exported folder, or the name of a timm model or of one that comes with mapet (also "
        "local-dir:FOLDER, hf-hub:ID)",
        common=True,
    )
    image_size: tuple[Pixels, Pixels] | None = key(
        None,
        "side of the input in pixels, or rows x columns as 192x256; position embeddings are resized; default: the "
        "model's",
        common=True,
    )
    reinit: bool = key(False, "use random weights instead of the model's own, as a baseline")

    @field_validator("image_size", mode="before")
    @classmethod
    def _one_side_or_two(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if isinstance(value, str):
            parts = value.lower().split("x")
            if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
                raise ValueError("write a number of pixels, or ROWSxCOLUMNS such as 192x256")
            return tuple(int(part) for part in (parts * 2)[:2])
        return value


class ModelKeys(NetworkKeys):
    """A trained model, and how images are put into it."""

    crop_pct: float | None = key(
        None, "share of the resized image's side that the model sees; default: the model's", ge=0.01, le=1
    )


class PrecisionKeys(Config):
    """The arithmetic of a network that is applied."""

    precision: Annotated[Literal["no", "bf16", "fp16"], NoIsAWord] = key("no", "precision of the network; no: float32")


class InferenceKeys(ModelKeys, PrecisionKeys, DataKeys):
    """A trained model applied to images, in order."""

    batch_size: BatchSize = key(256, "images at a time", common=True)


class PatchKeys(Config):
    """The student's grid."""

    image_size: Pixels = key(224, "side of the student's input in pixels", common=True)
    patch_size: Pixels = key(16, "side of the student's patches in pixels", common=True)


class TokenizerKeys(DataKeys):
    """A tokenizer that exists, and the images it is given."""

    tokenizer: Text = key(..., "the folder of a tokenizer, or 'dvae' or 'vqkd' (published)", common=True)
    teacher_weights: str | None = key(None, "of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE")
    channels: Channels | None = key(None, "channels of the images; default: as the tokenizer reads them")
    value_range: tuple[float, ...] | None = key(
        None, "of images with more than 8 bits: the values that become black and white; those of the pre-training"
    )

    @field_validator("value_range")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        return value and ordered_range(value)


class TeacherKeys(Config):
    """Which part of a teacher gives features, and how."""

    teacher_stage: str | int | None = key(
        None,
        "where to cut the teacher: the number of a stage or block (timm; -1: the last) or the name of a node "
        "(torchvision)",
    )
    teacher_size: Pixels | None = key(None, "side of the teacher's input in pixels; default: --image-size")
    teacher_weights: str | None = key(
        None,
        "weights of the teacher or of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE, perhaps with "
        "#sha256=HEX; default: the published ones",
    )


class KMeansKeys(TeacherKeys):
    """How a codebook is fitted by k-means."""

    vocab_size: VocabSize | None = key(
        None, "ids of a tokenizer to be fitted; default: as many as the data supports, up to 8192 (pixels: 1024)"
    )
    contrast: bool = key(True, "k-pixels: normalise each patch to mean 0, variance 1")
    spherical: bool = key(False, "k-means by direction: features are scaled to length 1")
    kmeans_iterations: int = key(20, "iterations of k-means", ge=1, le=10**4)
    kmeans_restarts: int = key(1, "runs of k-means, of which the best is kept", ge=1, le=1000)
    points_per_centroid: Count | None = key(
        None, "patches sampled for each id; default: up to 256, fewer where k-means would take hours"
    )
    sample_gib: float = key(4.0, "most memory for the sampled patches, in GiB", gt=0, le=2**20)


def check_teacher(given: Mapping[str, Any], name: str | None) -> None:
    """Raise ValueError if a key of a teacher is given, but there is no teacher."""
    for setting in TeacherKeys.model_fields:
        if name in (None, "pixels") and given.get(setting) is not None:
            raise ValueError(f"{setting} is given, but there is no teacher; name one")


class ViewKeys(Config):
    """How an image is cropped; keys that are left out are those of the token store, if there is one."""

    crop_min: float = key(CHOSEN, "least share of the image that a random crop covers; default: 0.2", gt=0, le=1)
    flip: Share = key(CHOSEN, "probability of a horizontal flip; default: 0.5")
    mirror: bool = key(CHOSEN, "with --views: each crop in both orientations, whatever --flip; default: false")

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Return the keys of a view."""
        return {"crop_min": 0.2, "flip": 0.5, "mirror": False} | {
            name: given[name] for name in ViewKeys.model_fields if name in given
        }


class TrainKeys(DataKeys):
    """How the trainer trains, whatever it trains."""

    default_epochs: ClassVar[int] = 300
    default_batch: ClassVar[int] = 256
    published_rate: ClassVar[tuple[float, int]] = 1.5e-3, 2048  # learning rate, and the batch size it is for

    batch_size: BatchSize = key(
        CHOSEN,
        "images per optimiser step, over all devices; default: 256 (fine-tuning: 512), or fewer, so that an epoch has "
        "ten steps or more",
        common=True,
    )
    epochs: Epochs | None = key(
        None, "passes over the data; default: 300 (fine-tuning: 100)", common=True, instead_of="steps"
    )
    steps: Count = key(CHOSEN, "optimiser steps, instead of --epochs", common=True, instead_of="epochs")
    lr: LearningRate = key(
        CHOSEN,
        "peak learning rate; default: the paper's, 1.5e-3 * sqrt(batch size / 2048) (fine-tuning: 5e-4 * sqrt(batch "
        "size / 512)), where batches below 32 count as 32",
        common=True,
        instead_of="lrs",
    )
    min_lr: LeastRate = key(1e-5, "learning rate at the end of the cosine")
    warmup_lr: LeastRate = key(1e-6, "learning rate at the first step")
    warmup: float = key(10 / 300, "share of the run that warms up", ge=0, lt=1)
    weight_decay: WeightDecay = key(0.05, "AdamW's weight decay")
    beta2: float = key(0.999, "AdamW's second beta (the first is 0.9)", gt=0, lt=1)
    clip_grad: float = key(3.0, "largest gradient norm; above it gradients are scaled down", gt=0, le=1e30)
    accumulate: BatchSize = key(1, "micro-batches per optimiser step; saves memory", free=True)
    precision: Annotated[Literal["no", "bf16", "fp16"], NoIsAWord] = key(
        CHOSEN,
        "mixed precision: bf16, fp16 or no; default (auto): bf16 if the device computes it fast, fp16 on other CUDA "
        "GPUs, otherwise no",
    )
    compile: bool = key(
        False, "compile the step with torch.compile: the first steps take minutes, the others less time than without"
    )
    checkpoint_every: Count = key(CHOSEN, "optimiser steps between checkpoints; default: one epoch", free=True)
    keep: Count = key(
        1, "earlier checkpoints to keep: the last one before the loss rose, and others spread over the run", free=True
    )
    log_every: Count = key(1, "optimiser steps between lines of metrics.jsonl", free=True)

    @field_validator("precision", mode="before")
    @classmethod
    def _auto_is_not_given(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse both epochs and steps."""
        if given.get("epochs") is not None and given.get("steps") is not None:
            raise ValueError("give epochs or steps, not both")

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Fill in batch size, length, learning rate, precision and the time between checkpoints.

        Args:
            given: by the user.
            facts: ``images``, the size of the data set; ``processes`` that train together; ``precision`` that the
                device has fast.

        Raises:
            MapetError: if a batch is larger than the data set, or cannot be shared out evenly.
        """
        batch_size = cls.choose_batch(given, facts["images"], facts.get("processes", 1))
        per_epoch = facts["images"] // batch_size
        epochs = None if "steps" in given else given.get("epochs") or cls.default_epochs
        rate, batch = cls.published_rate
        # Adam's steps do not grow with the gradient; only its noise matters. So the rate follows the square root of the
        # batch size (Malladi et al., 2205.10287). The linear rule is for SGD.
        scaled = rate * math.sqrt(max(batch_size, LEAST_SCALED_BATCH) / batch)
        return {
            "batch_size": batch_size,
            "epochs": epochs,
            "steps": given["steps"] if epochs is None else epochs * per_epoch,
            "lr": given.get("lr", scaled),
            "precision": given.get("precision", facts.get("precision", "no")),
            "checkpoint_every": given.get("checkpoint_every", per_epoch),
        }

    @classmethod
    def images_together(cls, given: Mapping[str, Any]) -> int:
        """Return what the size of a micro-batch must be a multiple of."""
        return 1

    @classmethod
    def choose_batch(cls, given: Mapping[str, Any], images: int, processes: int) -> int:
        """Return the batch size, as given or chosen.

        Raises:
            MapetError: if it is larger than the data set, or cannot be shared out evenly.
        """
        parts: int = processes * given.get("accumulate", default_of(cls, "accumulate"))
        together = cls.images_together(given)
        unit = parts * together
        if images < unit:
            raise MapetError(
                f"{images} images are too few to be shared out among {processes} processes with {parts // processes} "
                f"micro-batches each, {together} at a time; add images, or take fewer processes and micro-batches"
            )
        if "batch_size" not in given:
            # The power of two that leaves an epoch ten steps.
            power = 1 << max(1, (images // LEAST_STEPS_PER_EPOCH).bit_length() - 1)
            return max(1, min(cls.default_batch, power, images) // unit) * unit
        size: int = given["batch_size"]
        if size > images:
            raise MapetError(
                f"batch size {size} is larger than the data set of {images} images; pass --batch-size {images} or less"
            )
        if size % parts:
            raise MapetError(
                f"batch size {size} cannot be divided among {processes} processes with {parts // processes} "
                f"micro-batches each; take a multiple of {parts}"
            )
        if size // parts % together:
            raise MapetError(
                f"mixup and cutmix pair the images of a batch, so {size // parts} at a time is odd; take --batch-size "
                f"{size + parts}, or --mixup 0 --cutmix 0"
            )
        return size
