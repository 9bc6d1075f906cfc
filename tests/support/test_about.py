"""about.py: what a model knows of its classes is read as it was written, or refused."""

import json

import pytest

from support.about import About
from support.layouts import Classes
from support.stretch import Stretch

ABOUT = About(
    Classes(("road", "roof"), ((1, 2, 3), (4, 5, 6))), "folder", "irrg", 7, 0.5, Stretch(((0, 9),))
)


def test_what_is_written_is_read():
    assert About.of_plain(json.loads(json.dumps(ABOUT.plain())), 2) == ABOUT
    older = {key: value for key, value in ABOUT.plain().items() if key != "stretch"}
    assert About.of_plain(older, 2) == ABOUT._replace(stretch=None)


BAD = {
    "a colour too few": {"colours": [[1, 2, 3]]},
    "a colour of two bands": {"colours": [[1, 2, 3], [4, 5]]},
    "no colour": {"colours": [[1, 2, 3], [4, 5, 256]]},
    "a class too many": {"classes": ["a", "b", "c"]},
    "no text": {"classes": [1, 2]},
    "no classes": {"classes": None},
    "no bands": {"bands": None},
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_none_is_refused(how):
    with pytest.raises((KeyError, TypeError, ValueError)):
        About.of_plain(ABOUT.plain() | BAD[how], 2)
    with pytest.raises(KeyError):
        About.of_plain({}, 2)
