"""place.py: where an image lies is carried to its map, or named."""

from support.place import aux_xml


def test_what_is_absent_or_broken_says_nothing(tmp_path):
    assert aux_xml(tmp_path / "a.png") is None
    (tmp_path / "a.png.aux.xml").write_text("<PAMDataset><SRS>")
    assert aux_xml(tmp_path / "a.png") is None
