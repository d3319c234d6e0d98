"""Copy the emoji of several vendors into labelled folders, for a comparison on colour images.

    for vendor in google twitter; do
      npm pack emoji-datasource-$vendor@16
      mkdir $vendor && tar xzf emoji-datasource-$vendor-16.0.0.tgz -C $vendor --strip-components 1
    done
    python benchmarks/emoji.py google twitter --out emoji
    mapet compare emoji --config compare_emoji --out runs/compare-emoji

A fifth of the emoji is the test part, the same fifth for every vendor. The training part also has the variants in other
skin tones; the test part leaves them out, because one class would get most of its images from them. Noto Emoji is
Apache-2.0, Twemoji CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", help="unpacked packages emoji-datasource-google, ...")
    parser.add_argument("--out", type=Path, default=Path("emoji"))
    arguments = parser.parse_args()

    for package in arguments.packages:
        vendor = json.loads((package / "package.json").read_text())["name"].removeprefix("emoji-datasource-")
        listed = json.loads((package / "emoji.json").read_text())
        emoji = [each for each in listed if each["category"] != "Component"]
        emoji.sort(key=lambda each: str(each["unified"]))
        random.Random(0).shuffle(emoji)  # the same order for every vendor: their lists are the same
        for number, each in enumerate(emoji):
            part = "test" if number < len(emoji) // 5 else "train"
            folder = arguments.out / part / each["category"]
            folder.mkdir(parents=True, exist_ok=True)
            for image in (each, *(each.get("skin_variations", {}).values() if part == "train" else ())):
                if image[f"has_img_{vendor}"]:
                    shutil.copy(package / "img" / vendor / "64" / image["image"], folder / f"{vendor}-{image['image']}")
    for part in ("train", "test"):
        print(part, {folder.name: len(list(folder.iterdir())) for folder in sorted((arguments.out / part).iterdir())})


if __name__ == "__main__":
    main()
