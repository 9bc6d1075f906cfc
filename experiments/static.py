"""What the compiler makes of every kernel that is shipped, on a machine without a GPU.

    python -m experiments.static                 # a table: registers, spills, shared memory, ...
    python -m experiments.static --json experiments/static.json    # the same as data

Triton compiles for a GPU that is not there, and NVIDIA's cuobjdump, which comes with it, reads the
result. So three things that make a kernel slow without making it wrong can be seen, and tested,
anywhere: registers that spill to memory, more shared memory than a processor has, and products
that do not reach the matrix units.

Block sizes come from the functions that the launches ask. A build is one of these for one dtype;
"ragged" has sizes that are no multiple of anything. Of the loss there are a usual and the largest
K, with the transfer that does most.

All builds take minutes. So each row of FILE has a hash of the source it was compiled from, and
--json compiles only what changed since. The tests compile a sample, and hold FILE to the rest.
"""

import argparse
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import bias, multiscale
from kernels.attention_triton import (
    HEAD_DIMENSIONS,
    HELD_CHUNKS,
    SUM_BLOCK,
    Blocks,
    forward_blocks,
    forward_kernel,
    key_gradient_blocks,
    key_gradient_kernel,
    query_gradient_blocks,
    query_gradient_kernel,
    sum_kernel,
)
from kernels.choose import INTERPRETED, triton
from kernels.distill import TRANSFERS
from kernels.distill_triton import BACKWARD_LANES, CELL_ROWS, FORWARD_LANES
from kernels.distill_triton import backward_kernel as loss_backward
from kernels.distill_triton import forward_kernel as loss_forward
from kernels.group_norm import backward_kernel as group_backward
from kernels.group_norm import forward_kernel as group_forward
from kernels.group_norm import gradient_sums_kernel, join_statistics_kernel, join_sums_kernel
from kernels.group_norm import joined as joined_chunks
from kernels.group_norm import statistics_kernel as group_statistics
from kernels.norm import PROGRAMS, tile_of, tile_of_parts
from kernels.norm import backward_kernel as norm_backward
from kernels.norm import forward_kernel as norm_forward
from kernels.norm import sum_kernel as norm_sum

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming
# Guide, table "Technical Specifications per Compute Capability").
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}


COMMITTED = Path(__file__).parent / "static.json"


class Build(NamedTuple):
    name: str
    kernel: object
    types: dict[str, str]  # of the parameters that are not i32
    constants: dict[str, object]
    warps: int
    stages: int
    ragged: bool = False


class Compiled(NamedTuple):
    build: str
    arch: int
    registers: int  # of each thread, 255 at most
    spilled: int  # bytes of each thread
    shared: int  # bytes of a program
    warps: int
    matrix: int  # instructions of the generation's own kind
    older_matrix: int  # mma.sync, which every generation has
    source: str  # source_hash of the build


def builds(arch: int) -> list[Build]:
    attention = attention_builds(SHARED_MEMORY[arch])
    norms = norm_builds() + group_norm_builds() + bias_builds()
    return attention + loss_builds(arch) + multiscale_builds() + norms


TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # float16 compiles as bfloat16 does


def attention_builds(shared_memory: int) -> list[Build]:
    """M = 256 is what the model has for a crop of 512 pixels: no slices of the queries at stages 3
    and 4. M = 1000 needs several chunks of keys, the last of them in part, and has slices."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = []
    for dtype, M in ((bf16, 256), (bf16, 1000), (fp32, 1000)):
        for D in HEAD_DIMENSIONS:
            for way, kernel, blocks in (
                ("forward", forward_kernel, forward_blocks),
                ("queries", query_gradient_kernel, query_gradient_blocks),
                ("keys", key_gradient_kernel, key_gradient_blocks),
            ):
                name = f"attention {way} {TYPES[dtype]} D={D} M={M}"
                chosen = blocks(M, D, dtype, shared_memory)
                found.append(attention_build(name, kernel, chosen, M, D, TYPES[dtype]))
    types = {"parts_ptr": "*fp32", "dk_ptr": "*bf16", "dv_ptr": "*bf16"}
    for slices, block in ((8, SUM_BLOCK), (64, 128)):
        constants, name = {"SLICES": slices, "BLOCK": block}, f"sum of {slices} slices"
        found.append(Build(name, sum_kernel, types, constants, 4, 3))
    return found


def attention_build(name: str, kernel, blocks: Blocks, M: int, D: int, dtype: str) -> Build:
    chunks = triton.cdiv(M, blocks.keys)
    constants = {"D": D, "QUERIES": blocks.queries, "KEYS": blocks.keys, "TILES": 8}
    constants |= {"CHUNKS": chunks, "RAGGED": M % blocks.keys != 0}
    if kernel is query_gradient_kernel:
        constants |= {"HELD": chunks <= HELD_CHUNKS}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("dk_ptr", "dv_ptr"), f"*{dtype}" if M == 256 else "*fp32")
    types |= {"statistics_ptr": "*fp32", "scale": "fp32", "scale_2": "fp32"}
    return Build(name, kernel, types, constants, blocks.warps, blocks.stages, ragged=M == 1000)


def loss_builds(arch: int) -> list[Build]:
    to_transformer, to_cnn = TRANSFERS["selective"]
    logits = ("cnn", "transformer", "student", "teacher", "gradient")
    types = {f"{name}_ptr": "*bf16" for name in logits}
    types |= {"labels_ptr": "*u8", "sums_ptr": "*fp32", "scale_ptr": "*fp32", "kappa": "fp32"}
    types["class_weights_ptr"] = "*fp32"
    found = []
    sizes = [(7, 1.0, False), (7, 2.0, True)]  # the second with class weights too
    # The largest K compiles for half a minute each: sm 80 alone, which took most for wider labels.
    sizes += [(16, 1.0, False), (16, 2.0, True)] * (arch == 80)
    for K, T, ragged in sizes:
        constants = {"K": K, "T": T, "ROWS": CELL_ROWS, "WEIGHTED": T != 1}
        forward = constants | {"LANES": FORWARD_LANES}
        forward |= dict(zip(("CT_CONSTANT", "CT_SLOPE"), to_transformer, strict=True))
        forward |= dict(zip(("TC_CONSTANT", "TC_SLOPE"), to_cnn, strict=True))
        name = f"loss forward K={K} T={T:g}"
        found.append(Build(name, loss_forward, types, forward, 4, 3, ragged))
        for student, weight in (("cnn", to_cnn), ("transformer", to_transformer)):
            backward = constants | {"LANES": BACKWARD_LANES, "STUDENT_IS_CNN": student == "cnn"}
            backward |= dict(zip(("CONSTANT", "SLOPE"), weight, strict=True))
            name = f"loss backward K={K} T={T:g} {student}"
            found.append(Build(name, loss_backward, types, backward, 2, 3, ragged))
    return found


def multiscale_builds() -> list[Build]:
    """A kernel that is turned round has other addresses, read once, and nothing else."""
    m, found = multiscale, []
    types = dict.fromkeys(("x_ptr", "taps_ptr", "y_ptr", "dy_ptr", "dk_ptr"), "*bf16")
    types |= {"partial_ptr": "*fp32"}
    for strips in (m.Y_STRIPS, m.Y_STRIPS // 2):
        sizes = {"CHANNELS": m.CHANNELS, "STRIPS": strips, "COLUMNS": m.Y_COLUMNS}
        sizes |= {"WINDOW": m.WINDOW, "TURNED": False}
        name = f"multiscale y bf16 {strips} strips"
        found.append(Build(name, m.convolution_kernel, types, sizes, m.CHANNELS, 1))
    sizes = {"CHANNELS": m.CHANNELS, "STRIPS": m.DK_STRIPS, "COLUMNS": m.DK_COLUMNS}
    sizes |= {"WINDOW": m.WINDOW, "KERNEL_ROWS": m.KERNEL_ROWS}
    sums = {"PARTS": m.PARTS, "LANES": m.SUM_LANES}
    return [
        *found,
        Build("multiscale dk bf16", m.kernel_gradient_kernel, types, sizes, m.CHANNELS, 1),
        Build("multiscale sum bf16", m.sum_kernel, types, sums, 4, 3),
    ]


def norm_builds() -> list[Build]:
    """As under autocast: the stream of tokens in float32, what feeds a product in bfloat16. C = 160
    is padded to 256; C = 1000 is the longest row in part, in float32 alone."""
    found = []
    for C, dtype in ((32, "bf16"), (160, "bf16"), (512, "bf16"), (1000, "fp32")):
        tile = tile_of(C)
        constants = {"C": C, "ROWS": tile.rows, "WIDTH": tile.width}
        types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "dx_ptr", "parts_ptr"), "*fp32")
        types |= {"eps": "fp32", "y_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}"}
        for way, kernel, more in (
            ("forward", norm_forward, {}),
            ("backward", norm_backward, {"TILES": 8}),
        ):
            name = f"layer norm {way} {dtype} C={C}"
            found.append(Build(name, kernel, types, constants | more, tile.warps, 3))
    sums = dict.fromkeys(("parts_ptr", "first_ptr", "second_ptr"), "*fp32")
    for parts in (16, 2 * PROGRAMS):  # few of them: of the images in group norm
        constants = dict(zip(("PARTS", "COLUMNS"), tile_of_parts(parts, 512), strict=True))
        found.append(Build(f"layer norm sum of {parts}", norm_sum, sums, constants, 8, 3))
    return found


def group_norm_builds() -> list[Build]:
    """Maps in bfloat16, in 8 groups; C = 1000 in float32. Joined are 64 chunks of an image."""
    fp32 = ("statistics", "weight", "bias", "parts", "sums", "means")
    found = []
    for C, dtype in ((16, "bf16"), (160, "bf16"), (1000, "fp32")):
        tile = tile_of(C)
        types = dict.fromkeys((f"{name}_ptr" for name in fp32), "*fp32") | {"eps": "fp32"}
        types |= dict.fromkeys((f"{name}_ptr" for name in ("x", "y", "dy", "dx")), f"*{dtype}")
        constants = {"C": C, "ROWS": tile.rows, "WIDTH": tile.width}
        names = ("CHUNKS", "GROUPS", "WIDTH")
        joined = dict(zip(names, joined_chunks(64, 8, C // 8), strict=True))
        joined |= {"G": 8, "CHANNELS": C // 8}
        for way, kernel, given in (
            ("statistics", group_statistics, constants | {"TILES": 8}),
            ("join statistics", join_statistics_kernel, joined),
            ("forward", group_forward, constants | {"G": 8}),
            ("gradient sums", gradient_sums_kernel, constants | {"G": 8, "TILES": 8}),
            ("join sums", join_sums_kernel, joined),
            ("backward", group_backward, constants | {"G": 8}),
        ):
            name = f"group norm {way} {dtype} C={C}"
            found.append(Build(name, kernel, types, given, tile.warps, 3))
    return found


def bias_builds() -> list[Build]:
    found, types = [], {"rows_ptr": "*bf16", "parts_ptr": "*fp32"}
    for C in (32, 160, 1024):
        tile = tile_of(C, bias.NUMBERS)
        constants = {"C": C, "ROWS": tile.rows, "WIDTH": tile.width, "TILES": 8}
        name = f"bias bf16 C={C}"
        found.append(Build(name, bias.row_sum_kernel, types, constants, tile.warps, 3))
    return found


def sample() -> list[tuple[int, Build]]:
    """(arch, build): the first build of every kernel, each for the generation after the last's."""
    archs = tuple(SHARED_MEMORY)
    kernels = list(dict.fromkeys(build.kernel for build in builds(archs[0])))
    found = [(archs[i % len(archs)], kernel) for i, kernel in enumerate(kernels)]
    return [(arch, next(b for b in builds(arch) if b.kernel is kernel)) for arch, kernel in found]


def source_hash(build: Build) -> str:
    """Of what the compiler is given: the Triton functions of the kernel's file, without comments
    and docstrings, and the build's types and constants. It is the same in the interpreter."""
    functions = vars(inspect.getmodule(build.kernel.fn))
    sources = {
        name: code(function.fn)
        for name, function in functions.items()
        if isinstance(function, type(build.kernel))
    }
    given = [build.kernel.fn.__name__, sources, build.types, build.constants, build[4:]]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code(function) -> str:
    """The function's tokens but for comments and docstrings."""
    kept, starts = [], True
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if starts and token.type in (tokenize.STRING, tokenize.NEWLINE):
            continue  # a docstring and the end of its line
        kept.append(token.string.strip() or tokenize.tok_name[token.type])
        starts = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return " ".join(kept)


def compile_for(build: Build, arch: int) -> Compiled:
    """Raises what Triton raises when a kernel does not compile."""
    names = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "i32")
        for name in names
    }
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and name not in ("N", "M", "h", "w") * build.ragged)
    ]
    source = triton.compiler.ASTSource(
        build.kernel,
        signature,
        {name: build.constants[name] for name in names if name in build.constants},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=triton.backends.compiler.GPUTarget("cuda", arch, 32),
        options={"num_warps": build.warps, "num_stages": build.stages},
    )
    used = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        build.name,
        arch,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
        build.warps,
        len(re.findall(MATRIX_INSTRUCTIONS[arch], ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
        source_hash(build),
    )


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel in a binary, as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", path]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", printed)}


def compile_one(arch: int, name: str) -> Compiled:
    (build,) = (build for build in builds(arch) if build.name == name)
    return compile_for(build, arch)


def compile_all(known: list[Compiled] = ()) -> list[Compiled]:
    """Every build for every generation; those in `known` that have not changed are taken over.

    In processes: a good part of compiling is Python, of which threads run one at a time.
    """
    work = [(arch, build) for arch in SHARED_MEMORY for build in builds(arch)]
    done = {c[:2]: c for c in known}
    found = [done.get((build.name, arch)) for arch, build in work]
    missing = [
        i
        for i, (_, build) in enumerate(work)
        if found[i] is None or found[i].source != source_hash(build)
    ]
    print(f"{len(missing)} of {len(work)} builds to compile", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as executor:
        tasks = {i: executor.submit(compile_one, work[i][0], work[i][1].name) for i in missing}
        for i, task in tasks.items():
            found[i] = task.result()
    return found


def read(path: Path) -> tuple[str, list[Compiled]]:
    """Triton's version and the builds of a file that --json wrote."""
    entry = json.loads(path.read_text())
    return entry["triton"], [Compiled(**row) for row in entry["builds"]]


def table(found: list[Compiled]) -> str:
    """A row a build, with a number for each generation; "-" where it is not compiled. Products
    that have no instruction of their own generation are counted as mma.sync."""
    columns = ("kernel", "warps", "registers, sm 80 / 90 / 100", "spilled bytes")
    columns += ("shared memory, KiB", "matrix instructions")
    rows = [columns, ["---"] * len(columns)]
    for build in dict.fromkeys(c.build for c in found):
        of = {c.arch: c for c in found if c.build == build}

        def each(value, of=of) -> str:
            return " / ".join(str(value(of[arch])) if arch in of else "-" for arch in SHARED_MEMORY)

        row = [build, each(lambda c: c.warps), each(lambda c: c.registers)]
        row += [each(lambda c: c.spilled), each(lambda c: f"{c.shared / 1024:.1f}")]
        rows.append(row + [each(lambda c: c.matrix or c.older_matrix)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sentence = "write the table as data too; compiles only what is not in it yet or has changed"
    parser.add_argument("--json", type=Path, metavar="FILE", help=sentence)
    options = parser.parse_args()
    if triton is None or INTERPRETED:
        parser.error("needs Triton, and TRITON_INTERPRET not set")
    version, known = read(options.json) if options.json and options.json.exists() else ("", [])
    # Another version of Triton makes other code of the same source.
    found = compile_all(known if version == triton.__version__ else [])
    print(table(found))
    if options.json:
        rows = [c._asdict() for c in found]
        entry = {"triton": triton.__version__, "torch": torch.__version__, "builds": rows}
        options.json.write_text(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    main()
