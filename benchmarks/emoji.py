"""Lay out emoji as labelled folders, for a comparison on colour images: two drawers' pictures of the same signs.

    for drawer in google twitter; do
      npm pack emoji-datasource-$drawer@16
      mkdir $drawer && tar xzf emoji-datasource-$drawer-16.0.0.tgz -C $drawer --strip-components 1
    done
    python benchmarks/emoji.py google twitter --out emoji
    mapet compare emoji --config compare_emoji --out runs/compare-emoji

A fifth of the signs is kept for testing, by every drawer, without their variants in other skin tones, which would make
one class most of all; variants of the others are trained on. Noto Emoji is Apache-2.0, Twemoji CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", help="unpacked, emoji-datasource-google, -twitter, ...")
    parser.add_argument("--out", type=Path, default=Path("emoji"))
    arguments = parser.parse_args()

    for package in arguments.packages:
        drawer = json.loads((package / "package.json").read_text())["name"].removeprefix("emoji-datasource-")
        listed = json.loads((package / "emoji.json").read_text())
        signs = [sign for sign in listed if sign["category"] != "Component"]
        signs.sort(key=lambda sign: str(sign["unified"]))
        random.Random(0).shuffle(signs)  # the same for all drawers, whose lists are the same
        for number, sign in enumerate(signs):
            part = "test" if number < len(signs) // 5 else "train"
            folder = arguments.out / part / sign["category"]
            folder.mkdir(parents=True, exist_ok=True)
            for image in (sign, *(sign.get("skin_variations", {}).values() if part == "train" else ())):
                if image[f"has_img_{drawer}"]:
                    shutil.copy(package / "img" / drawer / "64" / image["image"], folder / f"{drawer}-{image['image']}")
    for part in ("train", "test"):
        print(part, {folder.name: len(list(folder.iterdir())) for folder in sorted((arguments.out / part).iterdir())})


if __name__ == "__main__":
    main()
