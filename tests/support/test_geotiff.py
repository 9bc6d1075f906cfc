"""geotiff.py: what is written can be read back, at the same place, and is whole or not there."""

import numpy as np
import pytest
from PIL import Image

from support import geotiff
from support.geotiff import create
from support.images import read_image
from support.layouts import POTSDAM
from support.masks import read_indices
from support.place import GEO_TAGS, georeference
from support.raster import DataError, header, read_tags


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# ETRS89 / UTM 33N (EPSG:25833), 5 cm pixels, as a program for maps writes it.
GEO = {
    33550: (12, [0.05, 0.05, 0.0]),
    33922: (12, [0.0, 0.0, 0.0, 366979.4, 5808017.25, 0.0]),
    34735: (3, [1, 1, 0, 4, 1024, 0, 1, 1, 1025, 0, 1, 1, 1026, 34737, 15, 0, 3072, 0, 1, 25833]),
    34737: (2, b"ETRS89 / UTM 33|\0"),
}
NO_DATA = {42113: (2, b"0\0")}
WORLD = b"0.05\n0\n0\n-0.05\n366979.425\n5808017.225\n"


def write(path, pixels, cuts=(0, 1, 40, 41, 300), **settings):
    """In pieces of unequal height."""
    with create(path, pixels.shape, **settings) as file:
        for top, bottom in zip(cuts, [*cuts[1:], len(pixels)], strict=True):
            file.append(pixels[top:bottom])


@pytest.mark.parametrize("name", ["m.tif", "m.png"])
@pytest.mark.parametrize("width", [1, 3, 1000])
def test_rows_come_back(tmp_path, name, width):
    pixels = noise(700, width)
    write(tmp_path / name, pixels)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "L" and np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(read_indices(tmp_path / name), pixels)
    classes = pixels % 6
    write(tmp_path / name, classes, colours=POTSDAM.colours)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), classes)
        colours = np.array(POTSDAM.colours)[classes]
        assert np.array_equal(np.asarray(image.convert("RGB")), colours)
    assert [*tmp_path.iterdir()] == [tmp_path / name]


def test_colours_come_back(tmp_path):
    pixels = noise(700, 333, 3)  # in blocks of 262 rows
    write(tmp_path / "m.png", pixels)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
    with pytest.raises(ValueError, match="rows of 333 x 3 bytes are expected"):
        with create(tmp_path / "m.png", pixels.shape) as file:
            file.append(pixels[..., 0])


def test_what_fails_in_a_thread_is_raised(tmp_path, monkeypatch):
    def fail(self, rows):
        raise MemoryError("no room to compress")

    monkeypatch.setattr(geotiff.TiffWriter, "compress", fail)
    with pytest.raises(MemoryError, match="no room to compress"):
        write(tmp_path / "m.tif", noise(700, 1000))
    assert not [*tmp_path.iterdir()]


def test_the_memory_is_a_few_strips_whatever_the_height(tmp_path):
    """Less than a strip waits for its rows, two a thread to be written; only the offsets grow."""
    with create(tmp_path / "m.tif", (4000, 1000)) as file:
        for _ in range(40):
            file.append(noise(100, 1000))
            assert len(file.waiting) < file.rows_per_block == geotiff.BLOCK_SIZE // 1000
            assert len(file.compressed) <= 2 * geotiff.THREADS
    assert len(read_tags(tmp_path / "m.tif")[273][1]) == -(-4000 // 262)


def test_a_map_as_high_as_promised_or_none(tmp_path):
    for name in ("m.tif", "m.png"):
        with pytest.raises(ValueError, match="1 of 3 rows were written"):
            with create(tmp_path / name, (3, 4)) as file:
                file.append(noise(1, 4))
        with pytest.raises(ValueError, match="rows of 4 bytes are expected"):
            with create(tmp_path / name, (3, 4)) as file:
                file.append(noise(3, 5))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["m.tif", "m.png"])
def test_an_interrupted_map_leaves_nothing_and_the_old_one_alone(tmp_path, name):
    for _ in range(2):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(KeyboardInterrupt):
            with create(tmp_path / name, (900, 900)) as file:
                file.append(noise(800, 900))
                assert not (tmp_path / name).exists() or before
                raise KeyboardInterrupt
        assert sorted(tmp_path.iterdir()) == before
        write(tmp_path / name, noise(900, 900))  # the second time there is an old one
    assert np.array_equal(read_indices(tmp_path / name), noise(900, 900))


def test_a_map_beyond_four_gigabytes_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="would not fit into the 4 GiB of a TIFF"):
        with create(tmp_path / "m.tif", (70_000, 70_000)):
            pass
    assert not [*tmp_path.iterdir()]


# --- Georeference -------------------------------------------------------------------------------


def place_of(path):
    return {tag: entry for tag, entry in read_tags(path).items() if tag in GEO_TAGS}


@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True)])
def test_tags_are_carried_with_their_types(tmp_path, write_tiff, order, big):
    scene = tmp_path / "scene.tif"
    write_tiff(scene, noise(20, 30, 3), order=order, big=big, tags=GEO | NO_DATA)
    write(tmp_path / "map.tif", noise(20, 30), (0,), place=georeference(scene))
    expected = {t: (k, v if k == 2 else tuple(v)) for t, (k, v) in GEO.items()}
    assert place_of(tmp_path / "map.tif") == expected
    assert 42113 not in read_tags(tmp_path / "map.tif")  # 0 is a class, not "no data"
    with Image.open(tmp_path / "map.tif") as image:  # as another reader sees them
        assert image.tag_v2[33922] == tuple(GEO[33922][1])
        assert image.tag_v2.tagtype[34735] == 3 and image.tag_v2[34737] == "ETRS89 / UTM 33|"


@pytest.mark.parametrize(
    "scene, side, expected",
    [
        ("a.tif", "a.tfw", "map.tfw"),
        ("a.TIFF", "a.TFW", "map.tfw"),
        ("a.tif", "a.tifw", "map.tfw"),
        ("a.tif", "a.wld", "map.wld"),
        ("a.tif", "a.prj", "map.prj"),
        ("a.png", "a.pgw", "map.pgw"),
        ("a.jpg", "a.jgw", "map.pgw"),
        ("a.jpeg", "a.jpgw", "map.pgw"),
        ("a.[1].png", "a.[1].pgw", "map.pgw"),
        ("a.tif", "b.tfw", None),
        ("a.tif", "a.pgw", None),
        ("a.png", "a.b.pgw", None),
    ],
)
def test_world_files_take_the_maps_name(tmp_path, scene, side, expected):
    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "in" / scene)
    (tmp_path / "in" / side).write_bytes(WORLD)
    name = "map.tif" if "tif" in scene.lower() else "map.png"
    place = georeference(tmp_path / "in" / scene)
    write(tmp_path / "out" / name, noise(20, 30), (0,), place=place)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == sorted([name, expected] if expected else [name])
    if expected:
        assert (tmp_path / "out" / expected).read_bytes() == WORLD


def test_an_image_without_a_place_gets_none(tmp_path, write_tiff):
    scene = write_tiff(tmp_path / "scene.tif", noise(20, 30, 3))
    assert georeference(scene) == ({}, {}, ())


def test_a_written_map_is_an_ordinary_tiff(tmp_path):
    write(tmp_path / "m.tif", noise(700, 300))
    found = header(tmp_path / "m.tif")
    assert (found.compression, found.tiled, found.mode) == ("deflate", False, "L")
    with pytest.raises(DataError, match="is L, not RGB"):
        read_image(tmp_path / "m.tif")
