"""support/replay.py: one launch does what the function does, or says that it cannot."""

from threading import Event, Thread

import pytest
import torch

from support.replay import EAGER_CALLS, SHAPES, Replayed, ReplayedShapes

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


def test_each_shape_has_a_graph_of_its_own():
    doubled = ReplayedShapes(lambda x: 2 * x)
    for call in range(EAGER_CALLS + 3):
        for length in range(1, SHAPES + 1):
            x = torch.full((length,), float(call), device="cuda")
            assert doubled(x).tolist() == [2.0 * call] * length
    assert doubled.of_shape[x.shape, x.dtype].graph is not None


def test_a_shape_survives_many_others():
    """More than PyTorch has streams: a graph that is dropped must not take what this one needs."""
    weight = torch.randn(512, 512, device="cuda")
    product = ReplayedShapes(lambda x: x @ weight)
    x = torch.randn(64, 512, device="cuda")
    wanted = product(x).clone()
    for rows in range(1, 40):
        for _ in range(EAGER_CALLS + 1):
            product(torch.ones(rows, 512, device="cuda"))
        assert torch.equal(product(x), wanted)
    assert len({replayed.stream for replayed in product.of_shape.values()}) == SHAPES


def test_threads_use_the_gpu_while_a_graph_is_captured():
    """As infer.py's do: one uploads from pinned memory, another waits for what comes back."""
    stop, wrong = Event(), []

    def read_and_write():
        while not stop.is_set():
            x = torch.ones(1000).pin_memory().to("cuda", non_blocking=True)
            wrong.extend([x.sum().item()] if x.sum().item() != 1000 else [])

    thread = Thread(target=read_and_write)
    thread.start()
    try:
        for factor in range(2, 12):
            scaled = Replayed(lambda x, factor=factor: factor * x)
            for _ in range(EAGER_CALLS + 2):
                assert scaled(torch.ones(3, device="cuda")).tolist() == [factor] * 3
            assert scaled.graph is not None
    finally:
        stop.set()
        thread.join()
    assert not wrong
