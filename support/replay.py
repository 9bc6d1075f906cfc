"""A function of CUDA tensors as one launch.

    step = Replayed(function)       # function(*tensors) -> tensors, the same work at every call
    outputs = step(*tensors)

    model.forward = replayed_on(device, model.forward)  # one graph for images of each shape

A training step is more than a thousand small kernels, and launching one costs the host more time
than many of them cost the GPU. A CUDA graph records them once and launches all of them together.
"""

import gc
import sys
from collections import OrderedDict
from contextlib import contextmanager

import torch

EAGER_CALLS = 3  # before the capture: kernels are compiled, and what is made lazily is made
SHAPES = 2  # that have a graph at a time, with its memory: full batches, and the last of a scene


@contextmanager
def without_collection():
    """A capture ends in an error when Python's collector drops another graph meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Replayed:
    """The first calls run as they are, the next one is captured, and from then on it is replayed.

    The function may read and change tensors in place (weights, an optimiser's state). It must not
    read a value back to the host, nor depend on anything but tensors. Its outputs are overwritten
    by the next call. Where it cannot be captured it says so once and goes on call by call. Other
    threads may use the GPU meanwhile, on streams of their own or on the default one.
    """

    def __init__(self, function, capture: bool = True, stream: torch.cuda.Stream | None = None):
        """capture: False where the function also talks to other processes. stream: a graph that is
        dropped takes the workspaces of its stream along, so no other may have the same."""
        self.function, self.calls, self.may_capture = function, 0, capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = stream or torch.cuda.Stream(priority=-1)  # not the default one: to capture
        self.copied = torch.cuda.Event()  # the inputs of the last call

    def __call__(self, *inputs: torch.Tensor):
        """inputs: of the same shapes at every call, on the GPU or in pinned memory."""
        self.calls += 1
        if self.may_capture and self.calls == EAGER_CALLS + 1:
            self.capture(inputs)
        if self.graph is None:
            return self.eagerly(inputs)
        self.copied.synchronize()  # one call waits behind the running one, and no more
        for fixed, x in zip(self.inputs, inputs, strict=True):
            fixed.copy_(x, non_blocking=True)
        self.copied.record()
        self.graph.replay()
        return self.outputs

    def eagerly(self, inputs):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*(x.to("cuda", non_blocking=True) for x in inputs))
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    @without_collection()
    def capture(self, inputs) -> None:
        self.inputs = [x.to("cuda", copy=True) for x in inputs]
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.empty_cache()  # the graph has memory of its own
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # an aborted capture leaves its own one current,
            reason = str(error.__context__ or error).splitlines()[0]
            print(f"  note: not captured as a CUDA graph, so slower: {reason}", file=sys.stderr)
            # and the random generator unusable until another capture ends.
            again = torch.cuda.CUDAGraph()
            with torch.cuda.graph(again, stream=self.stream, capture_error_mode="thread_local"):
                torch.zeros(1, device="cuda")
        else:
            self.graph = graph


class ReplayedShapes:
    """A function of one tensor, replayed for each of the last shapes that it was called with.

    A new shape gets the stream of the one that it displaces: PyTorch has 32 in all, and gives them
    out in turns. Those of priority, which training has, are others.
    """

    def __init__(self, function):
        self.function = function
        self.of_shape: OrderedDict[tuple, Replayed] = OrderedDict()  # the last used comes last

    def __call__(self, x: torch.Tensor):
        key = x.shape, x.dtype
        if key not in self.of_shape:
            full = len(self.of_shape) == SHAPES
            stream = self.of_shape.popitem(last=False)[1].stream if full else torch.cuda.Stream()
            self.of_shape[key] = Replayed(self.function, stream=stream)
        self.of_shape.move_to_end(key)
        return self.of_shape[key](x)


def replayed_on(device: torch.device, function):
    """The function as ReplayedShapes on a GPU; itself on a CPU."""
    return ReplayedShapes(function) if device.type == "cuda" else function
