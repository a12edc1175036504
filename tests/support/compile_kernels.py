"""Compile the Triton kernels for GPUs that are not there. python tests/support/compile_kernels.py 80 86 89 90

Prints each kernel's architecture, name and bytes of shared memory. Needs Triton, with its own assembler, and no GPU.
From 90 on an update's kernels start before the one before has ended: none may touch memory before it has waited.
"""

import inspect
import re
import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem import adafactor_kernels, streaming


def tile(height, width):
    return {"HEIGHT": height, "WIDTH": width}


KERNELS = {  # as `fused_adafactor_update` and `rows_from_host` launch them on bf16 weights
    adafactor_kernels._square_sums: tile(*adafactor_kernels.SUMS_TILE),
    adafactor_kernels._running_means: {"BLOCK": 32},
    adafactor_kernels._norms: tile(*adafactor_kernels.NORMS_TILE),
    adafactor_kernels._step: {"STOCHASTIC": True} | tile(*adafactor_kernels.STEP_TILE),
    adafactor_kernels._vector_sums: {"BLOCK": 2**13},
    adafactor_kernels._vector_step: {"STOCHASTIC": True, "BLOCK": 2**13},
    streaming._copy_rows: {"BLOCK": 1024},
}
TYPES = {
    "i32": ["R", "C", "n", "rows_in_all", "width", *adafactor_kernels._NOT_SPECIALIZED],
    "fp32": ["divisor", "beta2_rest", "tiny", "least_norm"],
}
TYPES |= {"*bf16": ["p", "g", "table", "out"], "*i32": ["update_index"], "*i64": ["skipped", "ids"]}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names}

for capability in map(int, sys.argv[1:]):
    for kernel, constants in KERNELS.items():
        names = list(inspect.signature(kernel.fn).parameters)
        waits = capability >= 90 and "DEPENDENT" in names
        constants = constants | ({"DEPENDENT": waits} if "DEPENDENT" in names else {})
        types = {n: "constexpr" if n in constants else TYPE_OF.get(n, "*fp32") for n in names}
        source = ASTSource(kernel, types, constexprs={(names.index(n),): value for n, value in constants.items()})
        compiled = compile(source, target=GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        first = re.search(r"griddepcontrol\.wait|(ld|st|atom|cp\.async)\S*\.global", compiled.asm["ptx"])[0]
        assert (first == "griddepcontrol.wait") == waits, f"{kernel.fn.__name__} begins with {first}"
        assert compiled.asm["cubin"]
        print(f"sm_{capability}", kernel.fn.__name__, compiled.metadata.shared)
