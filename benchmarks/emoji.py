"""Lay out Google's emoji as labelled folders, for a comparison on colour images.

    npm pack emoji-datasource-google@16 && tar xzf emoji-datasource-google-16.0.0.tgz
    python benchmarks/emoji.py package --out emoji
    mapet compare emoji --config compare_emoji --out runs/compare-emoji

A fifth of the emoji is kept for testing, without their variants in other skin tones, which would make one class most of
all; variants of the others are trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("--out", type=Path, default=Path("emoji"))
    arguments = parser.parse_args()

    listed = json.loads((arguments.package / "emoji.json").read_text())
    shown = (one for one in listed if one["has_img_google"] and one["category"] != "Component")
    emoji = sorted(shown, key=lambda one: str(one["image"]))
    random.Random(0).shuffle(emoji)
    for number, one in enumerate(emoji):
        part = "test" if number < len(emoji) // 5 else "train"
        variants = [v for v in one.get("skin_variations", {}).values() if v["has_img_google"] and part == "train"]
        folder = arguments.out / part / one["category"]
        folder.mkdir(parents=True, exist_ok=True)
        for image in (one, *variants):
            shutil.copy(arguments.package / "img" / "google" / "64" / image["image"], folder)
    for part in ("train", "test"):
        print(part, {folder.name: len(list(folder.iterdir())) for folder in sorted((arguments.out / part).iterdir())})


if __name__ == "__main__":
    main()
