"""The configurations of ``mapet data pack`` and ``mapet data index``."""

from mapet.config.base import Config, key
from mapet.config.keys import Count, Text


class IndexConfig(Config):
    """Which shards."""

    data: Text = key(..., "a folder of tar files, one tar file, or s3://BUCKET/PREFIX")


class PackConfig(Config):
    """Which images are packed, and how large shards become."""

    data: Text = key(..., "the images: a folder, a text file of paths, shards, or hf:NAME")
    shard_mib: Count = key(512, "a shard is closed when it has reached this size in MiB", common=True)
