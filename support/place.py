"""Where an image lies on the ground: what is carried to its map, and what is not.

Letters: H W pixels.
"""

from pathlib import Path
from xml.etree import ElementTree


def aux_xml(path: Path) -> ElementTree.Element | None:
    """What GDAL and QGIS write beside an image, FILE.aux.xml; None if it is absent or broken."""
    try:
        return ElementTree.parse(Path(f"{path}.aux.xml")).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return None
