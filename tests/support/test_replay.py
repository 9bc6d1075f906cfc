"""support/replay.py: one launch does what the function does, or says that it cannot."""

import pytest
import torch

from support.replay import EAGER_CALLS, Replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]


def test_every_call_reads_its_inputs_and_changes_the_state():
    state = torch.zeros(3, device="cuda")

    def add(x, factor):
        return state.add_(factor * x).clone()

    added = Replayed(add)
    for call in range(EAGER_CALLS + 4):
        x, factor = torch.full((3,), float(call)), torch.tensor(2.0)
        found = added(x.pin_memory(), factor.pin_memory())
        assert found.tolist() == [call * (call + 1.0)] * 3  # 2 (0 + 1 + ... + call)
    assert added.graph is not None


def test_what_cannot_be_captured_runs_as_it_is(capsys):
    doubled = Replayed(lambda x: 2 * x if x.sum().item() > 0 else x)
    for _ in range(EAGER_CALLS + 3):
        assert doubled(torch.ones(2).pin_memory()).tolist() == [2.0, 2.0]
    assert capsys.readouterr().err.count("note: not captured as a CUDA graph, so slower") == 1
    assert torch.randn(3, device="cuda").isfinite().all()  # an aborted capture can forbid it
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
