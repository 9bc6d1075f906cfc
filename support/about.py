"""What a trained model knows of its classes and its images; it goes wherever the weights go.

    contents["about"] = about.plain()                           # of best.pt
    about = About.of_plain(contents["about"], num_classes=6)

An exported file has the same as JSON.
"""

from typing import NamedTuple

from support.layouts import Classes
from support.stretch import Stretch


class About(NamedTuple):
    """What a deployed Transformer knows of its classes, and where it comes from."""

    classes: Classes
    data: str  # the data set it was trained on
    bands: str  # of its images: "rgb", "irrg", "rgbir"
    step: int = 0  # of the training run
    val_miou: float | None = None  # on the validation split, in [0, 1]
    stretch: Stretch | None = None  # of images of 16 bits

    def plain(self) -> dict:
        """As plain types, for a file; the classes are two entries."""
        names, colours, _ = self.classes
        classes = {"classes": list(names), "colours": [list(colour) for colour in colours]}
        limits = self.stretch and [list(band) for band in self.stretch.limits]
        return self._asdict() | classes | {"stretch": limits}

    @classmethod
    def of_plain(cls, known: dict, num_classes: int) -> "About":
        """The inverse. KeyError, TypeError or ValueError if it is none, or not of so many classes.

        `plain` leaves out which class is clutter: that is the data set's to say."""
        names, colours = tuple(known["classes"]), []
        for red, green, blue in map(bytes, known["colours"]):  # bytes: each is in 0..255
            colours.append((red, green, blue))
        if not len(names) == len(colours) == num_classes:
            raise ValueError(f"{len(names)} names and {len(colours)} colours")
        if not all(isinstance(text, str) for text in (*names, known["data"], known["bands"])):
            raise ValueError("a name is no text")
        stretch = Stretch.of_lists(known.get("stretch"))  # older files have none
        rest = (known[key] for key in ("data", "bands", "step", "val_miou"))
        return cls(Classes(names, tuple(colours)), *rest, stretch)
