"""precision.py: weights and features in one precision, what needs float32 in float32."""

import numpy as np
import pytest
import torch

from ctclm import CTCLM, ModelConfig
from infer import predict
from support.cli import UsageError
from support.precision import Compiled, at_precision


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


def test_a_cpu_computes_in_bf16_only_if_it_can_and_is_compiled(monkeypatch):
    for capabilities, compiled, expected in (
        ({"amx_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": True}, True, torch.bfloat16),
        ({"amx_bf16": True}, False, torch.float32),
        ({"avx2": True, "amx_bf16": False}, True, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        student = CTCLM(ModelConfig(variant="tiny")).transformer
        assert at_precision(student, "auto", compiled).head.classify.weight.dtype == expected


def test_without_a_compiler_a_sentence_and_the_same_logits(monkeypatch, capsys):
    def compile(function, **options):
        def fail(images):
            raise RuntimeError("InvalidCxxCompiler: no-such-compiler\nand 20 more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    layer, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), torch.rand(3, 4)
    function = Compiled(layer)
    with torch.no_grad():
        assert torch.equal(function(x), layer(x)) and torch.equal(function(x), layer(x))
    message = capsys.readouterr().err
    assert message.count("note: not compiled, so slower: ") == 1 and "no-such-compiler" in message
    assert message.count("\n") == 1
