"""A first classes.json from a folder of masks: the values or colours that occur, names to fill in.

    python data.py classes MY_DATA      # reads MY_DATA/train/masks, writes MY_DATA/classes.json

Every mask is read to its end. An index becomes a class, but 255 beside 0, 1, 2, ... is what is
ignored. The names are "class of 0", "class of 1", ...: what they mean is not in the masks.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from support.labels import ROWS
from support.layouts import IGNORE
from support.masks import NO_INDEX, MaskRows
from support.names import IMAGES, MASK_ENDINGS, visible_files
from support.raster import DataError

MOST = 100  # more values or colours than these are no classes


def propose(folder: Path) -> list[str]:
    """Write FOLDER/classes.json; what was found, as lines to print.

    folder: of a data set, or of masks. Raises DataError when there is a classes.json, when there
    are no masks, or when they hold both indices and colours.
    """
    path = folder / "classes.json"
    if path.exists():
        raise DataError(f"{path}: is there already; move it away to have a new one")
    masks = find_masks(folder)
    pixels: Counter[int | tuple] = Counter()
    coloured = set()
    for mask in masks:
        rows = MaskRows(mask)
        coloured.add(rows.coloured)
        if len(coloured) > 1:
            raise DataError(f"{mask}: holds {kind_of(rows.coloured)}, {masks[0]} does not")
        for top in range(0, rows.shape[0], ROWS):
            part = rows.read(top, min(top + ROWS, rows.shape[0]))
            count(part, pixels)
            if len(pixels) > MOST:
                raise DataError(
                    f"{mask}: there are more than {MOST} {kind_of(rows.coloured)} up to here, too "
                    f"many for classes; is it a photograph, or was it saved with losses?"
                )
    found = sorted(value for value in pixels if value != NO_INDEX)
    if not found:
        raise DataError(f"{masks[0].parent}: all pixels of the masks have their no-data value")
    entry = classes_of(found)
    parts = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
    text = "{" + ",\n ".join(parts) + "}\n"
    path.write_text(text, encoding="utf-8")
    total = sum(pixels.values())
    lines = [f"{value!s:>16}  {pixels[value] / total:7.2%}" for value in sorted(pixels)]
    return [*lines, f"{path}: {len(entry['classes'])} classes; write their names into it"]


def kind_of(coloured: bool) -> str:
    return "colours" if coloured else "indices"


def find_masks(folder: Path) -> list[Path]:
    """Those of the training split, or of the folder itself."""
    for place in (folder / "train" / "masks", folder):
        if masks := visible_files(place, IMAGES):
            return masks
    beside = visible_files(folder / "train" / "images", IMAGES)
    masks = [path for path in beside if MASK_ENDINGS.search(path.stem)]
    if not masks:
        raise DataError(f"{folder}: holds no masks, and neither does {folder / 'train' / 'masks'}")
    return masks


def count(part: np.ndarray, pixels: Counter) -> None:
    """Add the pixels of each index (rows, W) or colour (rows, W, 3) in a part of a mask."""
    if part.ndim == 2:
        values, counts = np.unique(part, return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return
    code = part.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    values, counts = np.unique(code, return_counts=True)
    for value, number in zip(values[: MOST + 1].tolist(), counts.tolist(), strict=False):
        pixels[value >> 16, value >> 8 & 255, value & 255] += number


def classes_of(found: list) -> dict:
    """classes.json for these indices or colours."""
    if isinstance(found[0], tuple):
        names = [f"class of {red}, {green}, {blue}" for red, green, blue in found]
        return {"classes": names, "colours": [[*colour] for colour in found]}
    ignore = None
    if len(found) > 2 and found == [*range(len(found) - 1), IGNORE]:
        found, ignore = found[:-1], IGNORE
    names = [f"class of {value}" for value in found]
    return {"classes": names, "values": found, "ignore": ignore}
