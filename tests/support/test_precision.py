"""precision.py: weights and features in one precision, what needs float32 in float32."""

import numpy as np
import pytest
import torch

from ctclm import CTCLM, ModelConfig
from infer import predict
from support.cli import UsageError
from support.precision import at_precision


def test_a_precision_is_that_of_weights_and_features_alone():
    student = CTCLM(ModelConfig(variant="tiny")).transformer.eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    expected, seen = np.concatenate([p for _, p in predict(student, image)], axis=1), []
    assert at_precision(student, "auto") is student  # fp32 on a CPU
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    at_precision(student, "bf16")
    student.head.register_forward_hook(lambda module, features, logits: seen.append(logits))
    found = np.concatenate([p for _, p in predict(student, image)], axis=1)
    assert seen[0].dtype == torch.bfloat16 and found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 2e-3  # of probabilities about 1/6
    assert student.normalise.mean.dtype == student.head.norm.running_var.dtype == torch.float32


def test_a_cpu_takes_no_half_precision():
    with pytest.raises(UsageError, match="--precision fp16 is for a GPU; a CPU takes bf16"):
        at_precision(CTCLM(ModelConfig(variant="tiny")).transformer, "fp16")
