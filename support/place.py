"""Where an image lies on the ground: carried to its map, compared with its mask, or named as lost.

    place = georeference("scene.tif")           # tags and side files, to be written with the map
    save_side_files(place, "map.tif")
    place.lost                                  # what says something about place and is not carried
    misplaced("mask.tif", "scene.tif")          # a sentence if both lie somewhere, and not together

A map has the same pixel grid as its image. So whatever says where the image lies holds for the map,
and is copied without change: GeoTIFF's tags (scale, tie points, transformation, ground control
points, rational polynomial coefficients), world files, .prj, and of FILE.aux.xml the coordinate
system, the transformation, the control points and the coefficients.

A transformation has six numbers, as GDAL has them: x = a + b * column + c * row and
y = d + e * column + f * row, where (0, 0) is the outer corner of the first pixel.

Letters: H W pixels.
"""

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from support.raster import Tags, data_errors, header, read_tags

# Pixel scale, tie points, transformation, keys, the keys' numbers and texts, RPC. Tag 42113, the
# image's no-data value, is left out: in a class map this value would be a class.
SCALE, TIE_POINTS, MATRIX, KEYS = 33550, 33922, 34264, 34735
NUMBERS = (SCALE, TIE_POINTS, MATRIX, 34736, 50844)  # doubles, though some programs write integers
GEO_TAGS = (*NUMBERS, KEYS, 34737)
INTERGRAPH_TAGS = (33918, 33919, 33920)
POINT_KEY, PROJECTED_KEY, GEOGRAPHIC_KEY, USER_DEFINED = 1025, 3072, 2048, 32767

WORLD_FILES = {  # the endings in use for each format
    "TIFF": (".tfw", ".tifw", ".tiffw", ".wld"),
    "PNG": (".pgw", ".pngw", ".wld"),
    "JPEG": (".jgw", ".jpgw", ".jpegw", ".wld"),
}
# MapInfo, OziExplorer, QGIS, ArcGIS, ERDAS: these name another file, or no GDAL reads them.
OTHER_FILES = (".tab", ".map", ".points", ".tfwx", ".pgwx", ".jgwx", ".aux", ".qpj", ".rpb")
GPS = 34853  # a directory of EXIF
# A system in well-known text ends with its own code. Those inside are of its datum, of the metre.
OUTERMOST_CODE = r'(?:AUTHORITY|ID)\["EPSG",\s*"?(\d+)"?\]\s*\]\s*$'
TOLERANCE = 0.6  # pixels; half a pixel is how far programs disagree about centres and corners


class Georeference(NamedTuple):
    """Where an image lies on the ground: its GeoTIFF tags, and side files by their ending."""

    tags: Tags
    files: dict[str, bytes]
    lost: tuple[str, ...] = ()  # what else says something about it


def georeference(path: Path) -> Georeference:
    """The georeference of `path` and of the side files with its name; empty when there is none."""
    path, form = Path(path), header(path).format
    tags = read_tags(path) if form == "TIFF" else {}
    endings = (*WORLD_FILES[form], ".prj", *((".rpb", "_rpc.txt") if form == "TIFF" else ()))
    files = {ending: side.read_bytes() for ending in endings if (side := beside(path, ending))}
    lost = [side.name for end in OTHER_FILES if end not in files and (side := beside(path, end))]
    if (xml := aux_xml(path)) is not None:
        if placed := place_of(xml):
            files[".aux.xml"] = placed
        elif xml.find(".//GeodataXform") is not None:
            lost.append(f"{path.name}.aux.xml (by ArcGIS)")
    elif Path(f"{path}.aux.xml").exists():
        lost.append(f"{path.name}.aux.xml (cannot be parsed)")
    if {*tags} & {*INTERGRAPH_TAGS}:
        lost.append("Intergraph's tags")
    if form == "JPEG" and has_gps(path):
        lost.append("the camera's position in EXIF")
    carried = {tag: tags[tag] for tag in GEO_TAGS if tag in tags}
    carried |= {tag: (12, tuple(map(float, carried[tag][1]))) for tag in {*NUMBERS} & {*carried}}
    return Georeference(carried, files, tuple(lost))


def beside(path: Path, ending: str) -> Path | None:
    """The file of this name with another ending, in lower or upper case."""
    for name in (f"{path.stem}{ending}", f"{path.stem}{ending.upper()}"):
        if path.with_name(name).is_file():
            return path.with_name(name)
    return None


def has_gps(path: Path) -> bool:
    with data_errors(path), Image.open(path, formats=("JPEG",)) as image:
        return bool(image.getexif().get_ifd(GPS))


def save_side_files(place: Georeference, path: Path) -> None:
    """Write the side files under the name of `path`, with the ending that its format uses.

    Those of an earlier map of this name are removed: they would place this one.
    """
    path = Path(path)
    world = {".tif": ".tfw", ".png": ".pgw"}[path.suffix]
    endings = {".wld": ".wld", ".prj": ".prj", ".rpb": ".RPB", "_rpc.txt": "_RPC.TXT"}
    names = {ending: f"{path.stem}{kept}" for ending, kept in endings.items()}
    names[".aux.xml"], names["world"] = f"{path.name}.aux.xml", f"{path.stem}{world}"
    for name in names.values():
        path.with_name(name).unlink(missing_ok=True)
    for ending, content in place.files.items():
        path.with_name(names.get(ending, names["world"])).write_bytes(content)


# --- FILE.aux.xml -------------------------------------------------------------------------------


def aux_xml(path: Path) -> ElementTree.Element | None:
    """What GDAL and QGIS write beside an image, FILE.aux.xml; None if it is absent or broken."""
    try:
        return ElementTree.parse(Path(f"{path}.aux.xml")).getroot()
    except (FileNotFoundError, ElementTree.ParseError, ValueError, LookupError):
        return None  # the last two: an encoding that the parser does not know


def place_of(xml: ElementTree.Element) -> bytes:
    """The part of FILE.aux.xml that says where the image lies; b"" when there is none.

    The rest (statistics, no-data values) is of the image's bands and not of its map.
    """
    kept = ElementTree.Element("PAMDataset")
    kept.extend(node for node in xml if node.tag in ("SRS", "GeoTransform", "GCPList"))
    kept.extend(node for node in xml.findall("Metadata") if node.get("domain") == "RPC")
    return ElementTree.tostring(kept) if len(kept) else b""


# --- Image and mask -----------------------------------------------------------------------------


def misplaced(mask: Path, image: Path) -> str:
    """A sentence when both are georeferenced and lie at different places; else ""."""
    codes = epsg_code(mask), epsg_code(image)
    if None not in codes and codes[0] != codes[1]:
        return (
            f"{mask}: is in EPSG:{codes[0]}, but its image {image} in EPSG:{codes[1]}; convert it: "
            f"gdalwarp -r near -t_srs EPSG:{codes[1]} IN.tif OUT.tif, or, if only its code is "
            f"wrong: gdal_edit.py -a_srs EPSG:{codes[1]} {mask.name}"
        )
    of_mask, of_image = transformation(mask), transformation(image)
    if of_mask is None or of_image is None:
        return ""
    found = header(image)
    corners = np.array([(1, x, y) for x in (0, found.width) for y in (0, found.height)]).T
    try:  # the mask's corners, as columns and rows of the image
        x_y = of_mask @ corners - of_image[:, :1]
        columns_rows = np.linalg.solve(of_image[:, 1:], x_y)
    except np.linalg.LinAlgError:
        return ""
    distance = abs(columns_rows - corners[1:]).max()
    if distance <= TOLERANCE:
        return ""
    return (
        f"{mask}: lies elsewhere than its image {image}: by their georeferences their corners are "
        f"{distance:,.1f} pixels apart; cut it out anew, or, if its pixels fit the image, remove "
        f"its georeference: gdal_edit.py -unsetgt {mask.name}"
    )


def transformation(path: Path) -> np.ndarray | None:
    """The six numbers as (2, 3); None when the file has none, or only control points.

    FILE.aux.xml comes before the tags and these before a world file, as in GDAL. What cannot be
    parsed is none: it is carried as it is.
    """
    try:
        return parse_transformation(path)
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def parse_transformation(path: Path) -> np.ndarray | None:
    xml, form = aux_xml(path), header(path).format
    if xml is not None and (text := xml.findtext("GeoTransform")):
        return np.array(text.split(","), float).reshape(2, 3)
    tags = read_tags(path) if form == "TIFF" else {}
    found = of_tags(tags)
    if found is not None:
        return found
    for ending in WORLD_FILES[form]:
        if side := beside(path, ending):
            b, e, c, f, x, y = map(float, side.read_text().replace(",", ".").split()[:6])
            return np.array([[x - (b + c) / 2, b, c], [y - (e + f) / 2, e, f]])
    return None


def of_tags(tags: Tags) -> np.ndarray | None:
    """The transformation that GeoTIFF's tags give."""
    if MATRIX in tags:
        a = np.array(tags[MATRIX][1][:8], float).reshape(2, 4)
        found = a[:, [3, 0, 1]]
    elif SCALE in tags and TIE_POINTS in tags and len(tags[TIE_POINTS][1]) == 6:
        column, row, _, x, y, _ = tags[TIE_POINTS][1]
        across, down, _ = tags[SCALE][1]
        found = np.array([[x - column * across, across, 0], [y + row * down, 0, -down]])
    else:
        return None
    if geo_key(tags, POINT_KEY) == 2:  # the numbers are of the pixel's centre
        found[:, 0] -= found[:, 1:].sum(axis=1) / 2
    return found


def geo_key(tags: Tags, key: int) -> int | None:
    """A number of the GeoTIFF keys, which are stored four by four: key, place, count, value."""
    keys = np.reshape(tags[KEYS][1], (-1, 4))[1:] if KEYS in tags else []
    return next(
        (int(value) for number, place, _, value in keys if (number, place) == (key, 0)), None
    )


def epsg_code(path: Path) -> int | None:
    """Of the coordinate system; None where it has no number, or what cannot be parsed."""
    try:
        return parse_epsg_code(path)
    except ValueError:
        return None


def parse_epsg_code(path: Path) -> int | None:
    xml = aux_xml(path)
    if xml is not None and (text := xml.findtext("SRS")):
        code = re.fullmatch(r"\s*EPSG:(\d+)\s*", text) or re.search(OUTERMOST_CODE, text)
        return int(code[1]) if code else None
    tags = read_tags(path) if header(path).format == "TIFF" else {}
    code = geo_key(tags, PROJECTED_KEY)
    if code is None:  # a user-defined projection has no number, though its base has one
        code = geo_key(tags, GEOGRAPHIC_KEY)
    return None if code == USER_DEFINED else code
