"""Files by their names: which of a folder are images, and which mask belongs to which image.

    images = by_stem(visible_files(folder, IMAGES), faults)     # {stem: path}; deep=True: any depth
    pairs, several = pair(images, masks)                        # {stem of an image: of its mask}

What a system leaves beside the images is passed over: hidden files and folders (`._N.png` and
`.DS_Store` of macOS), and all other endings (`Thumbs.db`, `desktop.ini`, world files). Endings may
be upper-case. Links to files and folders are followed.

A mask has the name of its image, or this name and one of MASK_ENDINGS, where only one mask does.
Accents are compared in their composed form: macOS writes them in two characters.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TIFFS = (".tif", ".tiff")
# DeepGlobe has 1_sat.jpg and 1_mask.png, other tools 1_label.tif, 1_gt.png, 1-labels.png, ...
MASK_ENDINGS = re.compile(r"[ _.-](masks?|labels?|gt|seg|annotations?|classes)$", re.IGNORECASE)
IMAGE_ENDINGS = re.compile(r"[ _.-](sat|images?|img|rgb|ortho)$", re.IGNORECASE)


def visible_files(folder: Path, endings: tuple[str, ...], deep: bool = False) -> list[Path]:
    """The files in a folder with one of these endings, sorted; with `deep` at any depth."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen and status.st_ino:  # a link back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        found += [Path(place, name) for name in files if is_visible(name, endings)]
    return sorted(found)


def is_visible(name: str, endings: tuple[str, ...]) -> bool:
    return not name.startswith((".", "~$")) and name.lower().endswith(endings)


def stem(path: Path) -> str:
    """The name without ending, its accents composed."""
    return unicodedata.normalize("NFC", path.stem)


def by_stem(paths: list[Path], faults: list[str]) -> dict[str, Path]:
    """Files by their name without ending. Two of one name are a fault."""
    files = {}
    for path in paths:
        if stem(path) in files:
            faults.append(f"{path} and {files[stem(path)].name} have one name: remove one")
        files.setdefault(stem(path), path)
    return files


def pair(images: Iterable[str], masks: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The mask of each image, by their stems; and of an image that could have several, which."""
    masks, loose = {*masks}, defaultdict(list)
    for mask in sorted(masks):
        loose[MASK_ENDINGS.sub("", mask)].append(mask)
    found, several = {}, {}
    for image in images:
        if image in masks:
            found[image] = image
            continue
        candidates = [*loose[image]]
        if (bare := IMAGE_ENDINGS.sub("", image)) != image:
            candidates += loose[bare]
        if len(candidates) > 1:
            several[image] = " and ".join(candidates)
        elif candidates:
            found[image] = candidates[0]
    return found, several
