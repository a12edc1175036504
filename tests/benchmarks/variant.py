"""A whole run of a script with one thing changed: the ablations of accuracy.py.

    python tests/benchmarks/variant.py NAME --run-name X ...

The scripts are copied to a temporary folder, and the change is made in their text.
"""

import argparse
import math
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEPENDENT_NOISE = [  # of each update
    (
        "common.py",
        "_random_words(at, updates // 2, number, part, seed), 0xFFFF * (updates % 2)",
        "_random_words(at, updates, number, part, seed), 0",
    )
]
FOR_GPUS = ("common.py", "if not self.fused:", 'if not self.fused:\n            raise ValueError("for GPUs alone")')
BETA2_WITHOUT_BIAS = [  # `seen`: what the second moment over 1,000 steps, which starts from 0, has of its whole weight
    ("common.py", "beta2=0.99,", "beta2=0.999,"),
    *(
        ("common.py", totals, f"{totals}\n    seen = 1 - tl.exp({updates}.to(tl.float32) * {math.log(0.999)})")
        for totals, updates in [
            ("u_square, p_square = _total(u_squares, tiles), _total(p_squares, tiles)", "tl.load(count)"),
            ("u_square, p_square = tl.load(sums + 1), tl.load(sums + 2)", "updates"),
        ]
    ),
    FOR_GPUS,
]
EQUAL_STEPS = [  # of each tensor the same RMS, the learning rate itself, as with Adam; not in proportion to its weights'
    ("common.py", "tl.maximum(tl.sqrt(p_square), least_norm)", "1000 * least_norm"),
    ("common.py", "norm = p_square.sqrt().clamp(min=1e-3 * math.sqrt(rows * cols))", "norm = math.sqrt(rows * cols)"),
]
UNFACTORED = [  # a second moment for each weight: what the update takes for the gradient is divided by it beforehand
    (
        "common.py",
        "        self.skipped.zero_()",
        """            if _as_matrix(p).shape[1] > 1:
                self.state[p]["square"] = torch.zeros_like(_as_matrix(p), dtype=torch.float32)
        self.skipped.zero_()""",
    ),
    (
        "common.py",
        '        rounding, compensation = group["rounding"]',
        """        if "square" in state:
            square = state["square"].lerp_(args[1].float().square() + FLOOR, 1 - group["beta2"])
            args[1] = args[1] * square.rsqrt()
        rounding, compensation = group["rounding"]""",
    ),
    ("common.py", "row_factor = tl.rsqrt(new_row_here / mean_row) * scale", "row_factor = new_row_here * 0 + scale"),
    ("common.py", "col_factor = tl.rsqrt(new_col_here)", "col_factor = new_col_here * 0 + 1"),
    ("common.py", "col_factor = tl.rsqrt(tl.load(new_col", "col_factor = 1 + 0 * (tl.load(new_col"),
    (
        "common.py",
        "row_factor = tl.rsqrt(tl.load(new_row + rows, mask=rows < R, other=1.0) / mean_row)",
        "row_factor = 1 + 0 * tl.load(new_row + rows, mask=rows < R, other=1.0)",
    ),
    FOR_GPUS,
]
MASTER_WEIGHTS = [  # fp32 ones are updated, and rounded to the nearest bf16 for the model: no step is lost, none random
    ("common.py", "is_vector = _as_matrix(local(p)).shape[1] == 1", "is_vector = False"),
    (
        "common.py",
        "        self.skipped.zero_()",
        """            self.state[p]["master"] = _as_matrix(p.detach()).float()
        self.skipped.zero_()""",
    ),
    (
        "common.py",
        '        rounding, compensation = group["rounding"]',
        """        args[0] = state["master"]
        rounding, compensation = group["rounding"]""",
    ),
    (
        "common.py",
        "            fused_adafactor_update(*args, rounding, **noise, whole=whole)",
        """            fused_adafactor_update(*args, rounding, **noise, whole=whole)
        p.copy_(args[0].view_as(p))""",
    ),
    # the start-up check would find that stochastic rounding is off
    ("finetune_lowmem.py", "if rounds_stochastically(optimizer, loss.device) != (", "if False and ("),
    FOR_GPUS,
]
VARIANTS = {  # name: (script, [(file, text, text instead)])
    "cut-cross-entropy": (  # cut-cross-entropy 25.1.1, every position's gradient used
        "finetune_lowmem",
        [
            (
                "finetune_lowmem.py",
                "return -(LinearLogProbs.apply(hidden, targets, head.weight, head.bias, head) * weights).sum()",
                "from cross_entropy import cut_cross_entropy_loss\n"
                "    return cut_cross_entropy_loss(head, hidden, targets, weights)",
            ),
            ("finetune_lowmem.py", 'if "LinearLogProbs" not in', 'if "LinearCrossEntropy" not in'),
        ],
    ),
    "clipping": (  # Shazeer & Stern's (2018, algorithm 4): an update of an RMS below 1 stays as small as it is
        "finetune_lowmem",
        [
            ("common.py", "norm / tl.sqrt(u_square)", "norm / tl.maximum(tl.sqrt(u_square), 1000 * least_norm)"),
            ("common.py", "norm / u_square.sqrt()", "norm / u_square.sqrt().clamp(min=math.sqrt(rows * cols))"),
        ],
    ),
    "clipping-beta2": (  # and the second moment over 1,000 steps, its bias towards 0 taken away before it is compared with 1
        "finetune_lowmem",
        [
            *BETA2_WITHOUT_BIAS,
            (
                "common.py",
                "norm / tl.sqrt(u_square)",
                "norm / tl.maximum(tl.sqrt(u_square), 1000 * least_norm / tl.sqrt(seen))",
            ),
        ],
    ),
    "equal-steps": ("finetune_lowmem", EQUAL_STEPS),
    "unfactored": ("finetune_lowmem", UNFACTORED),
    "unfactored-equal-steps": ("finetune_lowmem", EQUAL_STEPS + UNFACTORED),
    "factored-adam": (  # Adam's steps, but for its first moment and the factored second: no rescaling of any kind
        "finetune_lowmem",
        [*BETA2_WITHOUT_BIAS, ("common.py", "norm / tl.sqrt(u_square)", "tl.load(lr) * tl.sqrt(seen)")],
    ),
    "master-weights": ("finetune_lowmem", MASTER_WEIGHTS),
    "independent-noise": ("finetune_lowmem", INDEPENDENT_NOISE),
    "plain-rounding": (  # nor are vectors compensated
        "finetune_lowmem",
        [
            *INDEPENDENT_NOISE,
            ("common.py", "is_vector = _as_matrix(local(p)).shape[1] == 1", "is_vector = False"),
            ("common.py", "if own.shape[1] == 1:", "if False:"),
        ],
    ),
    "slow-vectors": (  # a tenth of the rate for norms' gains and biases
        "finetune_lowmem",
        [
            (
                "common.py",
                "fused_vector_update(*args, **noise",
                "fused_vector_update(*args[:4], 0.1 * args[4], *args[5:], **noise",
            )
        ],
    ),
    "beta2": ("finetune_lowmem", [("common.py", "beta2=0.99,", "beta2=0.999,")]),
    "no-momentum": (  # Adam with a first moment of one step
        "finetune_base",
        [
            (
                "finetune_base.py",
                "common.guarded(torch.optim.Adam)",
                "common.guarded(lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.0, 0.999)))",
            )
        ],
    ),
    "fp32-head": (  # the baseline's head and loss in fp32 throughout, where autocast rounds weights and logits to bf16
        "finetune_base",
        [
            (
                "finetune_base.py",
                """    with precision():
        logits = model(input_ids=batch.ids, use_cache=False).logits
    labels = batch.labels.flatten()
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=common.IGNORE, reduction="sum")
    return nll / batch.target_tokens
""",
                """    import finetune_lowmem
    hidden = common.hidden_states(model, batch, precision)
    return finetune_lowmem.target_loss(common.Head(model), hidden, batch.targets, batch.weights)
""",
            )
        ],
    ),
}


def make(name, folder):
    """Copy the scripts to the folder and change them there; return the one to run."""
    script, changes = VARIANTS[name]
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for file, old, new in changes:
        text = (Path(folder) / file).read_text()
        if old not in text:
            sys.exit(f"{file} no longer holds what {name} changes: {old}")
        (Path(folder) / file).write_text(text.replace(old, new))
    return script


def main():
    parser = argparse.ArgumentParser(usage="variant.py NAME --run-name X ...")
    parser.add_argument("name", choices=VARIANTS, metavar="NAME")
    name, argv = parser.parse_args(sys.argv[1:2]).name, sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        script = make(name, folder)
        sys.path[:0] = [folder, str(Path(__file__).parent)]
        sys.argv = [f"{script}.py", *argv]
        runpy.run_path(f"{folder}/{script}.py", run_name="__main__")


if __name__ == "__main__":
    main()
