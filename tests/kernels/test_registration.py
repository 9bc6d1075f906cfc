"""The package as the rest of PyTorch sees it: export, compile, several processes, no Triton."""

import os
import subprocess
import sys

import pytest
import torch

from ctclm import CTCLM, VARIANTS, ModelConfig, Variant
from kernels import force


@pytest.fixture
def model(device, monkeypatch):
    """Every operation, one block a stage, small enough for the interpreter and for tracing."""
    small = Variant((16, 32, 32, 32), (1, 2, 2, 2), (1, 1, 1, 1), 16)
    monkeypatch.setitem(VARIANTS, "tiny", small)
    return CTCLM(ModelConfig(variant="tiny", num_classes=2, align=False)).to(device)


@pytest.fixture
def batch(device):
    images = 255 * torch.rand(1, 3, 32, 32, device=device)
    return images, torch.randint(0, 2, (1, 32, 32), device=device)


@pytest.mark.parametrize("path", ["pytorch", "triton"])
def test_the_deployed_model_exports(path, model, batch):
    student, images = model.transformer.eval(), batch[0]
    with force(path):
        exported = torch.export.export(student, (images,))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert ("ctclm.attention.default" in targets) == (path == "triton")
        # The same operations, but tensors may lie in memory in another order: rounding differs.
        torch.testing.assert_close(exported.module()(images), student(images), rtol=0, atol=1e-5)


def test_a_whole_step_compiles_as_one_graph(model, batch):
    def loss(images, labels):
        return model.objective(model(images), labels).total

    def gradients(function):
        model.zero_grad()
        total = function(*batch)
        total.backward()
        return [total.detach(), *(p.grad.clone() for p in model.parameters())]

    with force("pytorch"):
        wanted = gradients(loss)
    with force("triton"):
        found = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(found, wanted, strict=True):
        # Kernels and references, in float32: sums are added up in another order, and where one
        # cancels its rounding is as large as that of the largest elements.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item() + 1e-7)


TWO_RANKS = """
import os, sys, torch, torch._dynamo, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ctclm import CTCLM, ModelConfig

child = os.fork()  # after the imports, which are most of the time, and before any computation
rank, store = int(child == 0), dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = CTCLM(ModelConfig(variant="tiny", num_classes=3, align=False))
images, labels = 255 * torch.rand(2, 1, 3, 32, 32), torch.randint(0, 3, (2, 1, 32, 32))

class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, images, labels):
        return self.model.objective(self.model(images), labels).total

def gradients():
    return torch.cat([p.grad.flatten() for p in model.parameters()])

parallel = DistributedDataParallel(Step())  # lives until the backward pass is done
parallel(images[rank], labels[rank]).backward()
averaged = gradients()
model.zero_grad()
sum(Step()(images[i], labels[i]) / 2 for i in range(2)).backward()
wanted = gradients()  # averaged in another order: rounded as the largest elements are
torch.testing.assert_close(averaged, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())
print("equal", flush=True)
dist.barrier()  # nobody leaves while the other still reads
dist.destroy_process_group()
sys.exit(child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="fork is POSIX")
def test_two_processes_average_their_gradients(tmp_path):
    """DistributedDataParallel sees the custom operations' gradients as any other's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_RANKS, str(tmp_path / "store")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "equal\nequal\n"), ended.stderr


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, kernels
from experiments import bench, static
from kernels import attention, collaborative_loss
q = torch.randn(1, 1, 5, 16)
attention(q, q, q)
z = torch.randn(1, 3, 2, 2, requires_grad=True)
collaborative_loss(z, z, torch.zeros(1, 8, 8).long()).cnn_ce.backward()
assert z.grad.isfinite().all() and bench.kernel_errors(torch.device("cpu")) == []
print("works")
"""


def test_everything_imports_and_runs_without_triton():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.stdout == "works\n", process.stderr
