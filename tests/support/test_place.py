"""place.py: where an image lies is carried to its map, compared with its mask, or named as lost."""

import json
import re
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image

from support.geotiff import create
from support.place import aux_xml, epsg_code, georeference, misplaced, transformation
from support.raster import read_tags

SIZE = (20, 30)
SCALE, TIE = {33550: (12, [0.5, 0.25, 0.0])}, {33922: (12, [0.0, 0.0, 0.0, 4e5, 5e6, 0.0])}
KEYS = {34735: (3, [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 25833])}
POINT = {34735: (3, [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 25833])}
TURNED = {34264: (12, [0.3, 0.1, 0, 4e5, 0.1, -0.3, 0, 5e6, 0, 0, 0, 0, 0, 0, 0, 1])}
CONTROL = {
    33922: (12, [0, 0, 0, 4e5, 5e6, 0, 30, 0, 0, 4e5 + 9, 5e6, 0, 0, 20, 0, 4e5, 5e6 - 7, 0])
}
RPC = {50844: (12, [-1, -1, 10, 15, 52, 13, 40, 10, 15, 0.1, 0.1, 500] + [0.5, 0.25, 0, 1, 0] * 16)}
WORLD = "0.5\n0.1\n0.2\n-0.25\n400000.25\n4999999.875\n"
GEO = "<GeoTransform>4e5, 0.5, 0.1, 5e6, 0.2, -0.25</GeoTransform>"
SRS = '<SRS dataAxisToSRSAxisMapping="1,2">EPSG:25833</SRS>'
GCPS = (
    '<GCPList Projection="EPSG:25833"><GCP Id="1" Pixel="0" Line="0" X="4e5" Y="5e6"/>'
    '<GCP Id="2" Pixel="30" Line="0" X="400009" Y="5e6"/>'
    '<GCP Id="3" Pixel="0" Line="20" X="4e5" Y="4999993"/></GCPList>'
)
BANDS = '<PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand>'
RPB = (
    """satId = "WV02";
bandId = "P";
SpecId = "RPC00B";
BEGIN_GROUP = IMAGE
\terrBias = 0.5;
\terrRand = 0.1;
\tlineOffset = 10;
\tsampOffset = 15;
\tlatOffset = 52;
\tlongOffset = 13;
\theightOffset = 40;
\tlineScale = 10;
\tsampScale = 15;
\tlatScale = 0.1;
\tlongScale = 0.1;
\theightScale = 500;
"""
    + "".join(
        f"\t{name}Coef = (\n" + ",\n".join(["\t\t\t1.0E-3"] * 20) + ");\n"
        for name in ("lineNum", "lineDen", "sampNum", "sampDen")
    )
    + "END_GROUP = IMAGE\nEND;\n"
)


def pam(*parts):
    return {".aux.xml": f"<PAMDataset>{''.join(parts)}</PAMDataset>"}


# name of the scene, tags, side files
SCENES = {
    "tags": ("a.tif", SCALE | TIE | KEYS, {}),
    "pixel is point": ("a.tif", SCALE | TIE | POINT, {}),
    "tie point inside": ("a.tif", SCALE | KEYS | {33922: (12, [4, 7, 0, 4e5, 5e6, 0])}, {}),
    "a turned grid": ("a.tif", TURNED | KEYS, {}),
    "control points": ("a.tif", CONTROL | KEYS, {}),
    "coefficients": ("a.tif", RPC, {}),
    "coefficients beside it": ("a.tif", {}, {".RPB": RPB}),
    "world file": ("a.tif", {}, {".tfw": WORLD}),
    "tags and another place beside them": ("a.tif", SCALE | TIE | KEYS, pam(SRS, GEO)),
    "PNG": ("a.png", {}, pam(SRS, GEO, BANDS)),
    "PNG with control points": ("a.png", {}, pam(GCPS)),
    "PNG with a world file": ("a.png", {}, {".pgw": WORLD}),
    "JPEG": ("a.jpg", {}, pam(SRS, GEO)),
    "JPEG with a world file and a system": ("a.jpg", {}, {".JGW": WORLD} | pam(SRS)),
}


def write_scene(folder, name, tags, sides, write_tiff):
    folder.mkdir(exist_ok=True)
    path, pixels = folder / name, np.random.default_rng(0).integers(1, 255, (*SIZE, 3), np.uint8)
    if path.suffix == ".tif":
        write_tiff(path, pixels, rows=7, tags=tags)
    else:
        Image.fromarray(pixels).save(path)
    for ending, text in sides.items():
        side = folder / f"{name}.aux.xml" if ending == ".aux.xml" else path.with_suffix(ending)
        side.write_text(text)
    return path


def write_map(scene):
    path = scene.with_name("map" + (".tif" if scene.suffix == ".tif" else ".png"))
    with create(path, SIZE, place=georeference(scene)) as file:
        file.append(np.zeros(SIZE, np.uint8))
    return path


ASK = """
import json, sys, rasterio
for path in sys.argv[1:]:
    with rasterio.open(path) as file:
        points, system = file.gcps
        rpcs = file.rpcs.to_dict() if file.rpcs else None
        found = [list(file.transform.to_gdal()), str(file.crs), str(system), rpcs]
        print(json.dumps([*found, [[p.row, p.col, p.x, p.y] for p in points]]))
"""


def test_rasterio_finds_scene_and_map_at_the_same_place(tmp_path, write_tiff, rasterio_python):
    scenes = [
        write_scene(tmp_path / str(number), *scene, write_tiff)
        for number, scene in enumerate(SCENES.values())
    ]
    paths = [path for scene in scenes for path in (scene, write_map(scene))]
    asked = subprocess.run([rasterio_python, "-c", ASK, *paths], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    nowhere = [[0, 1, 0, 0, 0, 1], "None", "None", None, []]
    for name, scene, of_scene, of_map in zip(
        SCENES, scenes, answers[::2], answers[1::2], strict=True
    ):
        assert of_scene == of_map != nowhere, name
        if of_scene[0] != nowhere[0]:  # the numbers that image and mask are compared by
            np.testing.assert_allclose(transformation(scene).ravel(), of_scene[0], err_msg=name)
        if of_scene[1] != "None":
            assert of_scene[1] == f"EPSG:{epsg_code(scene)}", name


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene[1]])
def test_tags_are_carried(tmp_path, write_tiff, name):
    file, tags, sides = SCENES[name]
    scene = write_scene(tmp_path / "in", file, tags, sides, write_tiff)
    carried, written = read_tags(scene), read_tags(write_map(scene))
    assert {tag: written[tag] for tag in tags} == {tag: carried[tag] for tag in tags}


@pytest.mark.parametrize("kind, letter", {1: "B", 3: "H", 5: "II", 8: "h", 9: "i", 11: "f"}.items())
def test_a_place_in_numbers_of_another_type_is_written_in_doubles(
    tmp_path, write_tiff, kind, letter
):
    """They ended in a KeyError after the whole map was made."""
    tie = [0, 0, 0, 40, 50, 0]
    path = write_scene(tmp_path, "a.tif", SCALE | {33922: (12, tie)} | KEYS, {}, write_tiff)
    if kind == 5:
        tie = [number for value in tie for number in (value, 1)]
    data = bytearray(path.read_bytes())
    entry = data.index(struct.pack("<HHI", 33922, 12, 6))
    offset = struct.unpack_from("<I", data, entry + 8)[0]
    struct.pack_into("<H", data, entry + 2, kind)
    struct.pack_into(f"<{6 * letter}", data, offset, *tie)
    path.write_bytes(data)
    assert read_tags(path)[33922][0] == kind
    placed = read_tags(write_map(path))[33922]
    assert placed == (12, (0, 0, 0, 40, 50, 0))
    np.testing.assert_array_equal(transformation(path), [[40, 0.5, 0], [50, 0, -0.25]])


def test_a_world_file_gives_the_centre_of_the_first_pixel(tmp_path, write_tiff):
    scene = write_scene(tmp_path / "in", "a.tif", {}, {".tfw": WORLD}, write_tiff)
    x, y = transformation(scene) @ (1, 0.5, 0.5)
    assert (x, y) == (400000.25, 4999999.875)


def test_only_what_says_where_is_carried_from_an_aux_xml(tmp_path, write_tiff):
    scene = write_scene(tmp_path / "in", "a.png", {}, pam(SRS, GEO, BANDS), write_tiff)
    written = aux_xml(write_map(scene))
    assert [node.tag for node in written] == ["SRS", "GeoTransform"]
    assert written.find("SRS").get("dataAxisToSRSAxisMapping") == "1,2"


def test_side_files_of_an_earlier_map_are_removed(tmp_path, write_tiff):
    """GDAL prefers FILE.aux.xml to the tags: the map would lie where the other image did."""
    folder, earlier = tmp_path / "in", {".tfw": WORLD, ".wld": WORLD, ".prj": "x", ".RPB": RPB}
    scene = write_scene(folder, "a.tif", {}, earlier | pam(SRS, GEO), write_tiff)
    (folder / "a_RPC.TXT").write_text("x")
    write_map(scene)
    assert len([*folder.glob("map*")]) == 7
    for path in folder.glob("a[._]*"):
        path.unlink()
    write_map(write_scene(folder, "a.tif", SCALE | TIE | KEYS, {}, write_tiff))
    assert [path.name for path in folder.glob("map*")] == ["map.tif"]


@pytest.mark.parametrize(
    "text",
    [
        "<PAMDataset><SRS>",
        '<?xml version="1.0" encoding="GBK"?><PAMDataset/>',
        '<?xml version="1.0" encoding="nonsense"?><PAMDataset/>',
    ],
)
def test_what_is_absent_or_broken_says_nothing(tmp_path, write_tiff, text):
    broken = {".aux.xml": text}
    scene = write_scene(tmp_path / "in", "a.png", {}, broken, write_tiff)
    assert aux_xml(scene) is None and transformation(scene) is None
    assert georeference(scene) == ({}, {}, ("a.png.aux.xml (cannot be parsed)",))
    scene = write_scene(tmp_path / "in", "b.png", {}, {".pgw": "no numbers"}, write_tiff)
    assert transformation(scene) is None and georeference(scene).files[".pgw"] == b"no numbers"


@pytest.mark.parametrize("ending", [".tab", ".map", ".points", ".tfwx", ".TAB"])
def test_what_is_not_carried_is_named(tmp_path, write_tiff, ending):
    scene = write_scene(tmp_path / "in", "a.tif", {}, {ending: "place"}, write_tiff)
    assert georeference(scene).lost == (f"a{ending}",)


def test_other_places_that_are_not_carried(tmp_path, write_tiff):
    exif = Image.Exif()
    exif.get_ifd(34853)[2] = (52.0, 31.0, 0.0)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert georeference(tmp_path / "a.jpg").lost == ("the camera's position in EXIF",)
    arcgis = pam("<GeodataXform><CoeffX>1</CoeffX></GeodataXform>")
    scene = write_scene(tmp_path / "in", "a.png", {}, arcgis, write_tiff)
    assert georeference(scene).lost == ("a.png.aux.xml (by ArcGIS)",)
    scene = write_scene(tmp_path / "in", "b.tif", {33920: (12, [0.0] * 16)}, {}, write_tiff)
    assert georeference(scene).lost == ("Intergraph's tags",)


# --- Image and mask -----------------------------------------------------------------------------


def mask_at(column=0.0, row=0.0, scale=1.0, code=25833):
    """Tags of a mask that begins at this column and row of the image of "tags" above."""
    keys = {34735: (3, [1, 1, 0, 2, 1025, 0, 1, 1, 3072, 0, 1, code])}
    tie = [0, 0, 0, 4e5 + 0.5 * column, 5e6 - 0.25 * row, 0]
    return {33550: (12, [0.5 * scale, 0.25 * scale, 0]), 33922: (12, tie)} | keys


@pytest.mark.parametrize(
    "mask, sentence",
    [
        (mask_at(), ""),
        (mask_at(0.5, 0.5), ""),  # a program that takes centres for corners
        (mask_at(1), "1.0 pixels apart"),
        (mask_at(-7, 24), "24.0 pixels apart"),
        (mask_at(scale=2), "30.0 pixels apart"),
        (mask_at(code=32632), "is in EPSG:32632, but .*a.tif in EPSG:25833; .* -t_srs EPSG:25833"),
        ({}, ""),
        (CONTROL | KEYS, ""),
    ],
)
def test_a_mask_that_lies_elsewhere(tmp_path, write_tiff, mask, sentence):
    image = write_scene(tmp_path / "in", "a.tif", SCALE | TIE | KEYS, {}, write_tiff)
    path = write_scene(tmp_path / "in", "m.tif", mask, {}, write_tiff)
    found = misplaced(path, image)
    assert bool(found) == bool(sentence)
    assert re.search(sentence, found) and found.startswith(str(path) if sentence else ""), found
    assert misplaced(path, write_scene(tmp_path / "in", "b.png", {}, {}, write_tiff)) == ""


METRE = 'UNIT["metre",1,AUTHORITY["EPSG","9001"]]'
NAMELESS = f'PROJCS["mine",GEOGCS["base",AUTHORITY["EPSG","4258"]],{METRE}]'
OWN_KEYS = {34735: (3, [1, 1, 0, 2, 2048, 0, 1, 4258, 3072, 0, 1, 32767])}
BASE_KEYS = {34735: (3, [1, 1, 0, 1, 2048, 0, 1, 4258])}


@pytest.mark.parametrize(
    "system, tags, code",
    [
        ("EPSG:25833", {}, 25833),
        (f'PROJCS["UTM 33",{METRE},AUTHORITY["EPSG","25833"]]', {}, 25833),
        (f'PROJCRS["UTM 33",{METRE},ID["EPSG",25833]]', {}, 25833),
        (NAMELESS, {}, None),
        (f'LOCAL_CS["local",{METRE}]', {}, None),
        ("", KEYS, 25833),
        ("", OWN_KEYS, None),
        ("", BASE_KEYS, 4258),
        ("", {34735: (3, [1, 1, 0, 1, 3072, 0])}, None),  # cut off
    ],
)
def test_the_code_is_that_of_the_whole_system(tmp_path, write_tiff, system, tags, code):
    """The last number of a text without one of its own is the metre's, 9001."""
    sides = pam("<SRS>", system.replace('"', "&quot;"), "</SRS>") if system else {}
    assert epsg_code(write_scene(tmp_path / "in", "a.tif", tags, sides, write_tiff)) == code


def test_a_mask_may_say_its_place_in_another_way(tmp_path, write_tiff):
    image = write_scene(tmp_path / "in", "a.jpg", {}, {".jgw": WORLD}, write_tiff)
    geo = GEO.replace("0.1, 5e6, 0.2", "0.2, 5e6, 0.1")
    same = write_scene(tmp_path / "in", "m.png", {}, pam(geo), write_tiff)
    assert misplaced(same, image) == ""
    moved = {".wld": WORLD.replace("400000", "400003")}
    other = write_scene(tmp_path / "in", "n.png", {}, moved, write_tiff)
    assert "pixels apart" in misplaced(other, image)
