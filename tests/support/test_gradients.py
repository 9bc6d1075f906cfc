"""support/gradients.py: the first gradient that is not finite, by its step and its part."""

import pytest
import torch

from support.gradients import DivergedError, require_finite


def test_the_first_that_is_not_finite_is_named():
    fine, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.inf])
    require_finite([fine, fine], ["cnn", "projectors"], 7, "windows 0..3")
    with pytest.raises(DivergedError, match=r"of the projectors .* at step 8 \(windows 0..3\)"):
        require_finite([fine, bad, bad], ["cnn", "projectors"], 7, "windows 0..3")
