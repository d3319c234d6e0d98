"""``mapet data VERB``: images in tar files."""

import json
from typing import Any

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.jobs.data.config import IndexConfig, PackConfig

JSON = "print the result as JSON"


def run_pack(call: Call) -> int:
    """Pack images."""
    from mapet.jobs.data.run import pack_images

    result = pack_images(call.values, call.out, console=call.console)
    return _show(call, result, f"\nuse it: mapet pretrain {call.out} ...")


def run_index(call: Call) -> int:
    """Index shards."""
    from mapet.jobs.data.run import index_shards

    return _show(call, index_shards(call.values))


def _show(call: Call, result: dict[str, Any], remark: str = "") -> int:
    if call.flags.json:
        print(json.dumps(result))
    else:
        labels = f" of {result['classes']} classes" if result["classes"] else ""
        call.say(f"{result['images']} images{labels} in {result['shards']} shard(s); index: {result['index']}{remark}")
    return 0


PACK = Verb(
    summary="pack images into tar files, which are read by random access",
    about="Pack images into tar files (shards), with names, bytes and labels. After a kill the same command goes on.",
    example="  mapet data pack ./photos --out shards\n  mapet pretrain shards --out runs/photos",
    configs=(PackConfig,),
    run=run_pack,
    positional={"data": None},
    required=True,
    out="the folder of the shards; shards that are there are kept",
    recipe=False,
    json=JSON,
    check_data=check_images,
)
INDEX = Verb(
    summary="make the index of tar files of images, if there is none",
    example="  mapet data index ./shards\n  mapet data index s3://bucket/photos",
    configs=(IndexConfig,),
    run=run_index,
    positional={"data": None},
    required=True,
    recipe=False,
    json=JSON,
    check_data=check_images,
)
