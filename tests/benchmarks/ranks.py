"""Memory, speed and loss of finetune_lowmem.py on one and on several GPUs: exact Llama shapes, random weights, real rows.

    python tests/benchmarks/ranks.py --tokenizer MODEL_FOLDER --dataset DATASET_FOLDER --out results.json
    python tests/benchmarks/ranks.py --reckon results.json   # such results, compared, and 70B on eight GPUs by them

As gpu.py, whose parts it uses: each case is the real script, in a process for each GPU. Layers are not compiled, as in a
run of fewer than 8,000 steps. With the demo's rows no graph is captured in the timed steps, except of 70B with 128 rows:
two, beside a GPU that has work (profiled steps, without any, take as long). Of several ranks the layers' random weights
are made on each GPU, since two copies of a 32B model do not fit the host; the 1B cases, whose losses are compared, have
the same weights.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu
import torch

import finetune_lowmem
from lowmem import cuda_graphs
from lowmem.training import checkpoint, command, fsdp, parallel, weights
from lowmem.training.memory import GIB

AS_IT_IS = {
    "NCCL_BUFFSIZE": "4194304",
    "NCCL_LL_BUFFSIZE": "262144",
    "NCCL_LL128_BUFFSIZE": "5242880",
    "NCCL_MAX_CTAS": "32",
    "NCCL_GRAPH_MIXING_SUPPORT": "1",
}
FEW_BLOCKS = {"NCCL_MAX_CTAS": "8"}
# name: (GPUs, shape, flags, (steps before timing, timed, profiled), GiB that each card may have or None, environment)
CASES = {
    "1B, one GPU": (1, "1B", [], (64, 136, 0), None, {}),
    "1B, one GPU, other rounding noise": (1, "1B", [], (64, 136, 0), None, {}),
    "1B, two GPUs": (2, "1B", [], (64, 136, 0), None, {}),
    "1B, two GPUs, compiled": (2, "1B", [], (64, 64, 0), None, {}),
    "1B, two GPUs, --trained all": (2, "1B", ["--trained", "all"], (64, 64, 0), None, {}),
    "8B, one GPU": (1, "8B", [], (64, 32, 0), None, {}),
    "8B, two GPUs": (2, "8B", [], (64, 32, 0), None, {}),
    "8B, one GPU, batch 16": (1, "8B", ["--batch_size", "16"], (64, 32, 8), None, {}),
    "8B, one GPU, batch 32": (1, "8B", ["--batch_size", "32"], (64, 32, 0), None, {}),
    "8B, two GPUs, batch 32": (2, "8B", ["--batch_size", "32"], (64, 32, 8), None, {}),
    "8B, two GPUs, batch 32, NCCL as it is": (2, "8B", ["--batch_size", "32"], (64, 32, 0), None, AS_IT_IS),
    "8B, one GPU, batch 128": (1, "8B", ["--batch_size", "128"], (20, 16, 0), None, {}),
    "8B, two GPUs, batch 128": (2, "8B", ["--batch_size", "128"], (20, 16, 0), None, {}),
    "8B, four GPUs, batch 64": (4, "8B", ["--batch_size", "64"], (64, 32, 8), None, {}),
    "8B, four GPUs, batch 64, NCCL as it is": (4, "8B", ["--batch_size", "64"], (64, 32, 8), None, AS_IT_IS),
    "8B, four GPUs, batch 64, NCCL on 8 blocks": (4, "8B", ["--batch_size", "64"], (64, 32, 8), None, FEW_BLOCKS),
    "8B, eight GPUs, batch 128": (8, "8B", ["--batch_size", "128"], (64, 32, 8), None, {}),
    "32B, two GPUs": (2, "32B", [], (24, 24, 0), 40, {}),
}
CASES |= {
    f"70B, {word} GPUs, batch {batch}": (gpus, "70B", ["--batch_size", f"{batch}"], (32, 16, 4), cap, {})
    for word, gpus, cap in [("four", 4, 48), ("eight", 8, 40)]
    for batch in (8, 32, 128)
}
KERNELS = {  # by what is in their names
    "matrix products": "nvjet|gemm",
    "communication": "nccl",
    "FSDP2's copies": "split_with_sizes|chunk_cat|multi_tensor_apply",
    "update": f"^({'|'.join(gpu.UPDATE_KERNELS)})$",
}
CONTEXT_GIB = 2.3  # of a capped card that PyTorch does not count: CUDA, NCCL, graphs of 80 layers


def random_shares(name, dtype):
    """Stands in for weights.load: of layers only shapes, whose weights `shard` then makes on the GPU."""
    model = gpu.meta_model(name, dtype)
    layers = set(model.model.layers.parameters())
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            here = torch.ones((), dtype=dtype).expand(p.shape)  # takes no memory
            if p not in layers:
                here = here.clone(memory_format=torch.contiguous_format)
            if p.ndim > 1 and p not in layers:
                here = (0.02 * torch.randn(p.shape, dtype=dtype, device="cuda")).cpu()
            module.register_parameter(key, torch.nn.Parameter(here))
    plain = fsdp.shard

    def shard(lm, *args):
        plain(lm, *args)
        generator = torch.Generator("cuda").manual_seed(1 + parallel.rank())
        for p in lm.trained.values():
            if p.ndim > 1:
                parallel.own_rows(p).normal_(0, 0.02, generator=generator)

    fsdp.shard = shard
    return model


def time_alone(spans, names):
    """Time in which kernels whose names match run, and no other, of [(name, start, end)]; in the unit of those."""
    edges = []
    for name, start, end in spans:
        matches = re.search(names, name) is not None
        edges += [(start, matches, 1), (end, matches, -1)]
    running, found, before = {True: 0, False: 0}, 0.0, None
    for time, matches, more in sorted(edges):
        if running[True] and not running[False]:
            found += time - before
        running[matches] += more
        before = time
    return found


def duration(spans):
    """Time from the first start to the last end of [(name, start, end)]."""
    return max(end for *_, end in spans) - min(start for _, start, _ in spans)


def spans_of(profiler):
    """[(name, start, end)] of the kernels that a torch.profiler has seen, in µs."""
    of_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.time_range.start, event.time_range.end) for event in of_gpu]


def worker(name, args):
    """Run one case's rank in this process; rank 0 writes the result."""
    gpus, shape, flags, (before, timed, profiled), cap, _ = CASES[name]
    cap = args.cap or cap
    stopwatch = gpu.Stopwatch(before, timed, profiled)
    checkpoint.save = checkpoint.require_disk = lambda *args: None
    cuda_graphs.GRAPHS_PAY_STEPS, cuda_graphs.COMPILING_PAYS_STEPS = 0, 0 if "compiled" in name else 10**9
    make = random_shares if gpus > 1 and shape != "1B" else gpu.random_model

    def load(*which):
        if cap:  # not before: the run must have chosen its GPU and its allocator when CUDA starts
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction((cap - CONTEXT_GIB) * GIB / total)
        return make(*which)

    weights.load = load
    plain = finetune_lowmem.Adafactor
    finetune_lowmem.Adafactor = lambda *a, **k: plain(*a, **k | ({"seed": 1} if "other rounding noise" in name else {}))
    argv = ["--run-name", "x", "--output_dir", args.folder, "--model", f"{args.folder}/model"]
    argv += ["--eval_rows", "200" if shape == "1B" else "40", "--log_every", "20", "--no_save_model"]
    argv += ["--schedule", "constant", "--dataset", args.dataset]
    summary = finetune_lowmem.main([*argv, "--max_steps", str(before + timed + profiled), *flags])
    if parallel.rank() == 0:
        kept = ["memory_gib", "memory_of_rank", "ledger_gib", "eval", "seconds_to_first_step"]
        kept += ["skipped_updates", "versions"]
        result = {"case": name, "commit": args.commit, "gpus": gpus, "batch_size": summary["args"]["batch_size"]}
        result |= {"cap_gib": cap} | stopwatch.result() | {key: summary[key] for key in kept}
        if stopwatch.kernels:
            result["kernel_ms"] = {
                kind: sum(ms for name, (ms, _) in stopwatch.kernels.items() if re.search(names, name))
                for kind, names in KERNELS.items()
            }
            spans = spans_of(stopwatch.profiler)
            result["profiled_ms_per_step"] = duration(spans) / 1000 / profiled
            result["only_communication_ms"] = time_alone(spans, KERNELS["communication"]) / 1000 / profiled
        Path(args.folder, "result.json").write_text(json.dumps(result | {"machine": gpu.machine()}))
        if cap and peak_gib(result) > cap:
            sys.exit(f"{peak_gib(result):.2f} GiB of a card were in use, more than {cap}: CONTEXT_GIB is too small")


def peak_gib(case):
    """GiB in use on the fullest card, in all phases."""
    return max(phase["device"] for phase in case["memory_gib"].values())


def compare(cases):
    """Lines: rows/s against one GPU, where the time goes, losses; and how far apart the losses of the 1B runs are."""
    for case in cases:
        name = case["case"]
        if "failed" in case:
            continue
        if one := of_one_gpu(case, cases, case["batch_size"]):
            yield f"{name}: {case['rows_per_second'] / one['rows_per_second']:.2f} times the rows/s of {one['case']}"
        if share := share_of_linear(case, cases):
            yield f"{name}: {share:.2f} of {case['gpus']} times the rows/s of one GPU with as many rows a card"
        if "kernel_ms" in case:
            times = ", ".join(f"{kind} {ms:.0f}" for kind, ms in case["kernel_ms"].items())
            yield f"{name}: of a step of {case['ms_per_step']:.0f} ms, kernels that may run side by side, ms: {times}"
        if share := share_of_communication(case):
            ms, of = case["only_communication_ms"], case["profiled_ms_per_step"]
            yield f"{name}: only communication runs for {ms:.0f} of a profiled step's {of:.0f} ms, {100 * share:.0f} %"
        if case["gpus"] > 1 and "--" not in name:  # those flags change what is moved
            yield f"{name}: {moved_gib(name.split(',')[0], case['gpus']):.0f} GiB moved to each card in a step"
        if case["gpus"] > 1:
            yield f"{name}: loss {losses(case)[0]:.2f} in the first 5 steps, {losses(case)[1]:.2f} in steps 26 to 30"
    found = {case["case"]: case for case in cases if "failed" not in case}
    three = [found.get(name) for name in ("1B, one GPU", "1B, one GPU, other rounding noise", "1B, two GPUs")]
    if all(three) and len({case["commit"] for case in three}) == 1:
        one, noise, two = three
        for name, other in (("two GPUs", two), ("other rounding noise", noise)):
            differences = [a - b for a, b in zip(other["losses"], one["losses"], strict=True)]
            last = differences[-50:]
            yield (
                f"1B, {name} minus one GPU, loss in nats: mean of {len(differences)} steps {statistics.mean(differences):.4f}, "
                f"of the last 50 {statistics.mean(last):.4f}, largest {max(map(abs, differences)):.4f}"
            )
            nll = other["eval"][-1]["gold_nll"] - one["eval"][-1]["gold_nll"]
            yield f"1B, {name} minus one GPU, held-out gold NLL after the last step: {nll:.4f}"


def of_one_gpu(case, cases, batch_size):
    """The case of the same model, settings and commit on one GPU with such a batch; None if there is none."""

    def alike(case):
        return re.sub(r", (one|two|four|eight) GPUs?|, batch \d+|, NCCL.*", "", case["case"]), case["commit"]

    if case["gpus"] == 1:
        return None
    ones = [one for one in cases if "failed" not in one and one["gpus"] == 1 and one["batch_size"] == batch_size]
    return next((one for one in ones if alike(one) == alike(case)), None)


def share_of_linear(case, cases):
    """Rows/s of a case on several GPUs over that of so many times one GPU with as many rows a card; None if unknown."""
    one = of_one_gpu(case, cases, case["batch_size"] / case["gpus"])
    return one and case["rows_per_second"] / one["rows_per_second"] / case["gpus"]


def share_of_communication(case):
    """Part of the profiled steps in which only communication ran; None if unknown or no other GPU took part.

    None too if those steps took a tenth longer than others: a graph was captured meanwhile.
    """
    profiled = case.get("profiled_ms_per_step")
    if case["gpus"] == 1 or not profiled or profiled > 1.1 * case["ms_per_step"]:
        return None
    return case["only_communication_ms"] / profiled


def losses(case):
    """Its mean losses of steps 1 to 5 and 26 to 30."""
    return statistics.mean(case["losses"][:5]), statistics.mean(case["losses"][25:30])


def moved_gib(shape, gpus):
    """GiB that a step moves to each of so many GPUs: layers for forward and backward, their gradients, the head."""
    layer, count, head = sizes(gpu.SHAPES[shape])
    return (3 * count * layer + head) * (gpus - 1) / gpus


def reckon(case, gpus):
    """(GiB of the fullest card, GiB moved to each in a step, GB/s, seconds at that rate) of a case on so many GPUs.

    Weights are dealt out to them; all else on a card stays as large. The rate is that at which the case's communication
    ran.
    """
    shape, share = case["case"].split(",")[0], case["ledger_gib"]["weights"]
    moved = moved_gib(shape, gpus)
    rate = moved_gib(shape, case["gpus"]) * GIB / 1e6 / case["kernel_ms"]["communication"]
    return peak_gib(case) - share + share * case["gpus"] / gpus, moved, rate, moved * GIB / 1e9 / rate


def sizes(config):
    """(bytes of a layer's bf16 weights in GiB, number of layers, of the head's) of a Llama."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = width * config["num_key_value_heads"] // heads
    layer = 2 * width * width + 2 * width * keys + 3 * width * config["intermediate_size"] + 2 * width
    return 2 * layer / GIB, config["num_hidden_layers"], 2 * width * config["vocab_size"] / GIB


def reckoning(cases):
    """Lines: 70B with 8 rows a step on eight GPUs, of cases on fewer."""
    for case in cases:
        if case["case"].startswith("70B") and case["batch_size"] == 8 and "failed" not in case and case["gpus"] < 8:
            peak, moved, rate, seconds = reckon(case, 8)
            yield (
                f"{case['case']}, on 8 GPUs reckoned: {peak:.1f} GiB of each card; {moved:.0f} GiB moved to each in a step, "
                f"at least {seconds:.1f} s at {rate:.0f} GB/s, {moved * GIB / 20e9:.1f} s at 20"
            )


HEADINGS = (
    f"{'GiB; first: seconds to the first step':42}{'batch':>5}{'allocated':>10}{'reserved':>9}{'device':>7}{'(load)':>7}"
    f"{'(eval)':>7}{'rows/s':>7}{'ms/step':>8}{'first':>6}"
)


def line_of(result):
    memory = result["memory_gib"]
    return (
        f"{result['case']:<42}{result['batch_size']:>5}{memory['train']['allocated']:>10.2f}"
        f"{memory['train']['reserved']:>9.2f}{memory['train']['device']:>7.2f}{memory['load']['device']:>7.2f}"
        f"{memory['eval']['device']:>7.2f}{result['rows_per_second']:>7.1f}{result['ms_per_step']:>8.1f}"
        f"{result['seconds_to_first_step']:>6.0f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reckons = "--reckon" in sys.argv
    parser.add_argument("--tokenizer", required=not reckons)
    parser.add_argument("--dataset", required=not reckons)
    parser.add_argument("--out", required=not reckons, help="JSON; cases that it holds are replaced, others kept")
    parser.add_argument(
        "--reckon", metavar="RESULTS", help="print the cases of RESULTS, how they compare, 70B on eight GPUs"
    )
    parser.add_argument("--cap", type=float, metavar="GIB", help="that each card may have, instead of the cases' own")
    parser.add_argument("--commit", default=gpu.commit(), help="recorded in the results; asked of git if left out")
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--case", choices=[*CASES], help="run this case's rank in this process")
    parser.add_argument("--folder", help="of --case")
    args = parser.parse_args()
    if args.case:
        command.start(lambda: worker(args.case, args))
        return
    if reckons:
        cases = json.loads(Path(args.reckon).read_text())["cases"]
        print(HEADINGS, *(line_of(case) for case in cases if "failed" not in case), sep="\n")
        print(*compare(cases), *reckoning(cases), sep="\n")
        return
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.exists() else {"cases": []}
    print(HEADINGS)
    for case in args.only:
        gpus, shape, *_, environment = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            gpu.make_folder(shape, args.tokenizer, Path(folder, "model"))
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
            argv = [sys.executable, *start, __file__, *sys.argv[1:], "--case", case, "--folder", folder]
            done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | environment)
            file = Path(folder, "result.json")
            result = json.loads(file.read_text()) if file.exists() else {"case": case, "commit": args.commit}
        if done.returncode:
            print(f"{case} failed:\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}", flush=True)
            result["failed"] = done.stderr[-300:]
        found["cases"] = [c for c in found["cases"] if c["case"] != case] + [result]
        out.write_text(json.dumps(found, indent=1))
        if not done.returncode:
            print(line_of(result), flush=True)
    print(*compare(found["cases"]), sep="\n")
    if any("failed" in c for c in found["cases"] if c["case"] in args.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
