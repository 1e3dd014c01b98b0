"""Ahead-of-time compilation of the Triton kernels, without a GPU, and what machine code they give.

    python tests/sass.py                 every kernel in its default configurations, as JSON
    python tests/sass.py --table FILE    the same as a Markdown table
    python tests/sass.py --list          the names of the cases; --only WORD compiles some of them

The launches are those that the host code makes: `compile_calls` lets it run on CPU tensors with a
driver that only knows what it compiles for, and keeps what the launches would have run. Needs a
process without TRITON_INTERPRET.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = (80, 90, 100)


@dataclasses.dataclass
class Kernel:
    """One compiled kernel."""

    case: str
    kernel: str
    sm: int
    registers: int
    spills: int  # bytes of local memory for each thread
    shared: int  # bytes for each program
    warps: int
    loads: dict[str, int]  # global accesses by width in bits
    stores: dict[str, int]
    sass: str = dataclasses.field(repr=False)

    def has(self, instruction):
        """How often an instruction (the beginning of its name) occurs."""
        return len(re.findall(rf"^\s*(?:@!?U?P\w+ )?{instruction}\b", self.sass, re.MULTILINE))


class Driver:
    """Stands in for a GPU of architecture `sm`: enough of a driver to compile."""

    def __init__(self, sm):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def is_active(self):
        return True


@contextlib.contextmanager
def _compiling_for(sm):
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Driver(sm))
    try:
        yield
    finally:
        driver._active = before


def compile_calls(case, sm, call):
    """[Kernel] that `call` would launch on an architecture, through triton_kernels/launch.py."""
    from rope_fused.triton_kernels.launch import Launch

    compiled = []

    def compile(launch, *tensors):
        operands = (*tensors, *launch.rest)
        compiled.append(launch.kernel.warmup(*operands, grid=(launch.programs,), **launch.options))

    real, Launch.start = Launch.start, compile
    try:
        with _compiling_for(sm):
            call()
    finally:
        Launch.start = real
    return [inspect(case, sm, one) for one in compiled]


def tool(name):
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def instructions(dump):
    """What cuobjdump -sass prints, an instruction a line."""
    # "/*0a10*/   @!P0 LDG.E.128 R4, desc[..][R2.64] ;   /* 0x... */" -> "@!P0 LDG.E.128 R4, ..."
    lines = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", dump, re.MULTILINE)
    return "\n".join(line.strip() for line in lines)


def accesses(sass):
    """How many global loads and stores there are of each width in bits."""
    widths = {"LDG": {}, "STG": {}}
    for name, flags in re.findall(r"\b(LDG|STG)((?:\.\w+)+)", sass):
        narrow = re.search(r"\.(?:S|U)?(8|16)\b", flags)
        wide = re.search(r"\.(64|128|256)\b", flags)
        width = (wide or narrow)[1] if wide or narrow else "32"
        widths[name][width] = widths[name].get(width, 0) + 1
    return widths["LDG"], widths["STG"]


def resources(module, sm):
    """{mangled name: {"REG" | "STACK" | "SHARED" | "LOCAL": number}} of a compiled module's kernels
    for an architecture ("90a")."""
    command = [tool("cuobjdump"), "-res-usage", "-arch", f"sm_{sm}", str(module)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\n\s*(REG.*)", usage)
    }


def built(module, sm, names=None):
    """[Kernel] that a compiled module holds for an architecture, all or those of mangled names."""

    known = resources(module, sm)
    only = [] if names is None else ["-fun", ",".join(names)]
    command = [tool("cuobjdump"), "-sass", *only, "-arch", f"sm_{sm}", str(module)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = []
    for part in dump.split("Function : ")[1:]:
        name, sass = part.split("\n", 1)
        sass, own = instructions(sass), known[name]
        short = re.search(r"(?<=\d)[a-z]+_kernel\w*", name.split("EEvN")[0])[0]
        kernels.append(
            Kernel(
                case=short,
                kernel=name,
                sm=int(re.match(r"\d+", sm)[0]),
                registers=own["REG"],
                spills=own["STACK"] + own["LOCAL"],
                shared=own["SHARED"],
                warps=0,  # chosen at the launch
                loads=accesses(sass)[0],
                stores=accesses(sass)[1],
                sass=sass,
            )
        )
    return kernels


def inspect(case, sm, compiled):
    """A Kernel from what triton.compile returned."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def ask(*command):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = ask(tool("cuobjdump"), "-res-usage", file.name)
        sass = ask(tool("cuobjdump"), "-sass", file.name)
    sass = instructions(sass)
    loads, stores = accesses(sass)
    number = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Kernel(
        case=case,
        kernel=compiled.metadata.name,
        sm=sm,
        registers=number["REG"],
        spills=number["STACK"] + number["LOCAL"],
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        loads=loads,
        stores=stores,
        sass=sass,
    )


# -- the cases -----------------------------------------------------------------------------------


def rotation_cases():
    """{name: call} of every rotation kernel in its default configurations."""
    import torch

    from rope_fused import RopeSpec, ops, triton_backend

    def operands(head_dim, heads, kv_heads, dtype, layout, tokens):
        def one(n):
            shape = (1, n, tokens, head_dim) if layout == "bhsd" else (1, tokens, n, head_dim)
            return torch.empty(shape, dtype=dtype)

        return one(heads), None if kv_heads is None else one(kv_heads)

    def rotation(spec, **kwargs):
        axis_map = spec.axis_map
        axis_map = None if axis_map is None else torch.tensor(axis_map, dtype=torch.int32)
        return ops.Rotation(
            spec.rows(), spec.turns(), spec.scale_rows(), axis_map=axis_map,
            rotary_offset=spec.rotary_offset, interleaved=spec.interleaved, **kwargs,
        )  # fmt: skip

    def case(head_dim=128, heads=32, kv_heads=8, dtype=torch.bfloat16, layout="bshd", tokens=64,
             norm=None, in_place=False, kind="rotate", spec=None, **kwargs):  # fmt: skip
        def call():
            q, k = operands(head_dim, heads, kv_heads, dtype, layout, tokens)
            made = RopeSpec.default(head_dim=head_dim, rope_theta=1e6, **(spec or {}))
            if norm:
                sizes = [head_dim * (n if norm == "all" else 1) for n in (heads, kv_heads)]
                weights = [torch.empty(n, dtype=dtype) for n in sizes]
                kwargs.update(q_norm=weights[0], k_norm=weights[1], norm_all=norm == "all")
            if kind == "tables":
                cos, sin = torch.empty(2, 1, tokens, made.rotary_dim, dtype=dtype)
                transpose = kwargs.get("transpose", False)
                triton_backend.rotate_tables(
                    q, k, cos, sin, made.interleaved, made.rotary_offset, transpose, layout
                )
            elif kind == "backward":
                turn = rotation(made, layout=layout, **kwargs)
                triton_backend.rotate_backward(q, k, None, q, k, turn, False)
            else:
                turn = rotation(made, layout=layout, **kwargs)
                triton_backend.rotate(q, k, turn, (q, k) if in_place else None)

        return call

    cases = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        cases[f"rotate {str(dtype)[6:]}"] = case(dtype=dtype)
    for head_dim in (64, 80, 96, 192, 256):
        cases[f"rotate head_dim {head_dim}"] = case(head_dim)
    index = torch.zeros(1, 64, dtype=torch.int32)
    positions = torch.zeros(1, 64, dtype=torch.int64)
    cases |= {
        "rotate in place": case(in_place=True),
        "rotate bhsd": case(layout="bhsd"),
        "rotate interleaved": case(spec={"interleaved": True}),
        "rotate partial": case(spec={"partial_rotary_factor": 0.5}),
        "rotate head_dim 512, last 64": case(
            512, 8, 1, spec={"partial_rotary_factor": 0.125, "rotary_offset": 448}
        ),
        "rotate one token": case(tokens=1),
        "rotate one kv head": case(kv_heads=1),
        "rotate positions": case(positions=positions),
        "rotate int32 positions": case(positions=positions.int()),
        "rotate tables by index": case(table_index=index, positions=positions),
        "rotate q_scale": case(token_scale=torch.empty(1, 64, dtype=torch.float32)),
        "rotate norm": case(norm="head"),
        "rotate norm all heads": case(norm="all"),
        "tables": case(kind="tables"),
        "tables transposed": case(kind="tables", transpose=True),
        "tables float32": case(kind="tables", dtype=torch.float32),
        "backward factors": case(kind="backward"),
        "backward factors, tables by index": case(kind="backward", table_index=index),
        "backward factors float32": case(kind="backward", dtype=torch.float32),
        "backward factors float64": case(kind="backward", dtype=torch.float64),
        "backward norm": case(kind="backward", norm="head"),
        "backward norm interleaved": case(
            kind="backward", norm="head", spec={"interleaved": True}
        ),
        "backward norm partial": case(
            kind="backward", norm="head", spec={"partial_rotary_factor": 0.5}
        ),
        "backward norm head_dim 256": case(256, kind="backward", norm="head"),
        "backward norm all heads": case(kind="backward", norm="all"),
    }  # fmt: skip
    return cases


def projection_cases():
    """{name: call} of the fused projection with the default tile of each kind of problem."""
    import torch
    from rope_fused.triton_kernels import configs, plan

    from rope_fused import RopeSpec, ops, triton_backend

    def case(head_dim=128, heads=(32, 8, 8), dtype=torch.bfloat16, tokens=256, norm=False,
             bias=False, keep=False, tf32=False, tile=None, spec=None, **kwargs):  # fmt: skip
        def call():
            from triton.runtime import driver

            made = RopeSpec.default(head_dim=head_dim, rope_theta=1e6, **(spec or {}))
            d_model = 4096
            x = torch.empty(tokens, d_model, dtype=dtype)
            weights = [
                torch.empty(n * head_dim, d_model, dtype=dtype) if n else None for n in heads
            ]
            outputs = [torch.empty(tokens, n, head_dim, dtype=dtype) if n else None for n in heads]
            outputs += [torch.empty_like(y) if keep else None for y in outputs[:2]]
            biases = [None if w is None or not bias else w[:, 0].contiguous() for w in weights]
            norms = {name: torch.empty(head_dim) for name in ("q_norm", "k_norm") if norm}
            rotation = ops.Rotation(
                made.rows(), made.turns(), made.scale_rows(), layout="thd",
                rotary_offset=made.rotary_offset, interleaved=made.interleaved, **norms, **kwargs,
            )  # fmt: skip
            sm = driver.active.get_current_target().arch
            head = configs.head_view(
                head_dim, made.rotary_dim, made.rotary_offset, made.interleaved
            )
            settings = torch.backends.cuda.matmul
            before, settings.fp32_precision = settings.fp32_precision, "tf32" if tf32 else "ieee"
            plan.device_of = lambda device: plan.Device("none", sm, 132)
            try:
                problem = configs.problem_of(x, weights, head_dim, rotation)
                chosen = configs.default_tile(sm, problem, head)._replace(**(tile or {}))
                assert triton_backend.project_fused(
                    x, weights, biases, outputs, head_dim, rotation, chosen
                )
            finally:
                settings.fp32_precision = before

        return call

    everything = {
        "norm": True,
        "bias": True,
        "keep": True,
        "token_scale": torch.empty(1, 256, dtype=torch.float32),
        "positions": torch.zeros(3, 1, 256, dtype=torch.int64),
        "table_index": torch.zeros(1, 256, dtype=torch.int32),
    }

    def every(head_dim=128, **kwargs):
        axis_map = torch.zeros(head_dim // 2, dtype=torch.int32)
        return case(head_dim, axis_map=axis_map, **everything, **kwargs)

    cases = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cases[f"project {str(dtype)[6:]}"] = case(dtype=dtype)
    cases["project tf32"] = case(dtype=torch.float32, tf32=True)
    cases["project tf32 head_dim 256, norm"] = case(256, dtype=torch.float32, tf32=True, norm=True)
    cases["project float32 head_dim 256, norm"] = case(256, dtype=torch.float32, norm=True)
    for head_dim in (64, 80, 96, 192, 256):
        cases[f"project head_dim {head_dim}"] = case(head_dim)
    return cases | {
        "project interleaved": case(spec={"interleaved": True}),
        "project partial": case(spec={"partial_rotary_factor": 0.5}),
        "project q and k": case(heads=(32, 8, 0)),
        "project norm": case(norm=True),
        "project norm head_dim 64": case(64, norm=True),
        "project norm head_dim 256": case(256, norm=True),
        "project bias": case(bias=True),
        "project keep": case(norm=True, keep=True),
        "project positions": case(positions=torch.zeros(1, 256, dtype=torch.int64)),
        "project few tokens": case(tokens=64),
        "project few tokens head_dim 256": case(256, tokens=64),
        "project one token, one head": case(heads=(1, 1, 1), tokens=1, keep=True),
        "project pointers": case(tile={"descriptors": False}),
        "project everything": every(),
        "project everything float32": every(dtype=torch.float32),
        "project everything head_dim 64 interleaved": every(64, spec={"interleaved": True}),
        "project everything head_dim 256": every(256),
        "project everything pointers": every(tile={"descriptors": False}),
    }


def all_cases():
    """{name: call that launches}; the first word of a name says which kernel."""
    return rotation_cases() | projection_cases()


# -- as a program --------------------------------------------------------------------------------


def names():
    """The names of all cases."""
    return _in_new_process("--list").splitlines()


def kernels(*options):
    """[Kernel] of the cases that command-line options choose."""
    return [Kernel(**kernel) for kernel in json.loads(_in_new_process(*options))]


def _in_new_process(*options):
    """What this file prints where no kernel is interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


_SPECIAL = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG")


def table(kernels):
    """Resources as Markdown."""
    import triton

    lines = [
        f"Triton {triton.__version__}: registers for each thread, bytes of shared memory for each "
        "program,",
        "bytes of local memory for each thread (spills), global accesses by width in bits,",
        "instructions for tensor cores and for copies to and from shared memory.",
        "Compiled, not yet run on a GPU.",
        "",
        "| case | sm | warps | registers | shared | spills | loads | stores | products, copies |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def widths(counts):
        return ", ".join(f"{n} × {w}" for w, n in sorted(counts.items(), key=lambda i: -int(i[0])))

    for k in kernels:
        lines.append(
            f"| {k.case} | {k.sm} | {k.warps} | {k.registers} | {k.shared} | {k.spills} "
            f"| {widths(k.loads)} | {widths(k.stores)} "
            f"| {', '.join(f'{n} × {name}' for name in _SPECIAL if (n := k.has(name)))} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--exact", action="store_true", help="whose name is this")
    parser.add_argument("--sm", type=int, action="append", help="80, 90, 100 (default: all)")
    parser.add_argument("--table", type=Path, help="write a Markdown table here")
    parser.add_argument("--list", action="store_true", help="names of the cases, and no more")
    options = parser.parse_args()

    def wanted(name):
        words = options.only or [name]
        return name in words if options.exact else any(word in name for word in words)

    cases = {name: call for name, call in all_cases().items() if wanted(name)}
    if options.list:
        print("\n".join(cases))
        return
    compiled = [
        kernel
        for name, call in cases.items()
        for sm in options.sm or ARCHITECTURES
        for kernel in compile_calls(name, sm, call)
    ]
    if options.table:
        options.table.write_text(table(compiled))
    else:
        print(json.dumps([dataclasses.asdict(kernel) for kernel in compiled]))


if __name__ == "__main__":
    main()
