"""Memory, speed and loss of both scripts on one GPU: random weights in the exact Llama shapes, real HellaSwag rows.

    python tests/benchmarks/gpu.py --tokenizer MODEL_FOLDER --dataset DATASET_FOLDER --out results.json

The folders are the demo's, in ~/.cache/lowmem_finetuning (run a --demo once); the last cases, those named SmolLM2, train its real model. Each case is the real script in a process
of its own, training and evaluation included; only the weights are made on the GPU instead of read, and no checkpoint is
written. SmolLM2's tokenizer stands in for Llama's: its ids are a part of Llama's vocabulary, and rows come out about as
long. Batches of all lengths are shuffled within windows of 64: compiled cases warm up, are timed and profiled over whole
windows, the others over parts of the first two. `busy` is the time of all kernels of a profiled step, one after the
other on one stream. Layers are compiled as a run of 8,000 steps or more compiles them, unless a case says otherwise.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem import adafactor, cuda_graphs
from lowmem.training import checkpoint, parallel, weights
from lowmem.training.memory import GIB
from lowmem.training.run import Run

LLAMA = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_attention_heads": 32, "num_key_value_heads": 8,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = {
    "1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "32B": LLAMA
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}
# name: (script, shape, flags, (steps before timing, timed, profiled), GiB that the card may have or None)
CASES = {
    "low-memory 1B": ("finetune_lowmem", "1B", [], (128, 128, 64), None),
    "low-memory 1B, again": ("finetune_lowmem", "1B", [], (128, 64, 0), None),
    "low-memory 1B, not compiled": ("finetune_lowmem", "1B", [], (128, 128, 64), None),
    "low-memory 1B, --no_compile": ("finetune_lowmem", "1B", ["--no_compile"], (16, 48, 16), None),
    "low-memory 1B, --no_compile, again": ("finetune_lowmem", "1B", ["--no_compile"], (16, 64, 0), None),
    "low-memory 1B, --no_compile, other rounding noise": ("finetune_lowmem", "1B", ["--no_compile"], (16, 64, 0), None),
    "low-memory 1B, --trained all": ("finetune_lowmem", "1B", ["--trained", "all"], (128, 64, 64), None),
    "FP32 Adam 1B": ("finetune_base", "1B", [], (16, 48, 16), None),
    "low-memory 1B, not compiled, cut": ("finetune_lowmem", "1B", ["--cross_entropy", "cut"], (128, 128, 64), None),
    "low-memory 8B": ("finetune_lowmem", "8B", [], (128, 64, 64), 15.5),
    "low-memory 8B, not compiled": ("finetune_lowmem", "8B", [], (128, 64, 64), 15.5),
    "low-memory 8B, --no_compile": ("finetune_lowmem", "8B", ["--no_compile"], (16, 48, 16), 15.5),
    "low-memory 8B, not compiled, whole card": ("finetune_lowmem", "8B", [], (32, 48, 0), None),  # for longer rows
}
BUDGETS = {  # --memory_budget: layers streamed from host memory; not compiled, as a run of fewer than 8,000 steps
    f"{shape}, batch {batch}, {gib:g} GiB": ("finetune_lowmem", shape, ["--batch_size", str(batch)], (24, 32, 4), gib)
    for shape, batch, gib in [
        ("8B", 8, 3), ("8B", 8, 4), ("8B", 8, 6), ("8B", 8, 8), ("8B", 8, 12), ("8B", 32, 6), ("1B", 8, 1.7),
    ]
} | {"32B, batch 8, 12 GiB": ("finetune_lowmem", "32B", ["--eval_rows", "40"], (8, 12, 2), 12)}  # fmt: skip
METHODS = {  # whose accuracy accuracy.py measures: (script, flags), those that take longest first
    "FP32 Adafactor, batch 8": ("finetune_base", ["--optimizer", "Adafactor", "--batch_size", "8"]),
    "FP32 Adam, batch 8": ("finetune_base", ["--batch_size", "8"]),
    "FP32 Adam, batch 32": ("finetune_base", []),
    "low-memory": ("finetune_lowmem", []),
    "low-memory, --nostround": ("finetune_lowmem", ["--nostround"]),
    "low-memory, --train_text raw": ("finetune_lowmem", ["--train_text", "raw"]),
    "low-memory, --trained all": ("finetune_lowmem", ["--trained", "all"]),
}
REAL_MODEL_CASES = {  # with the demo's SmolLM2, read from --tokenizer
    "low-memory SmolLM2": ("finetune_lowmem", None, [], (64, 64, 0), None),
    "low-memory SmolLM2, --no_compile, eager update": ("finetune_lowmem", None, ["--no_compile"], (64, 64, 0), None),
} | {
    f"SmolLM2 not compiled: {name}": (script, None, flags, (128, 128, 0) if "lowmem" in script else (16, 48, 0), None)
    for name, (script, flags) in METHODS.items()
}

UPDATE_KERNELS = ["_square_sums", "_running_means", "_norms", "_step", "_vector_sums", "_vector_step"]
ALL_CASES = CASES | BUDGETS | REAL_MODEL_CASES
YARDSTICKS = {  # whose losses are compared with whose
    "low-memory 1B": "low-memory 1B, --no_compile",
    "low-memory 1B, again": "low-memory 1B",
    "low-memory 1B, --no_compile, again": "low-memory 1B, --no_compile",
    "low-memory 1B, --no_compile, other rounding noise": "low-memory 1B, --no_compile",
    "low-memory 1B, not compiled": "low-memory 1B, --no_compile",
    "low-memory 8B": "low-memory 8B, --no_compile",
    "low-memory 8B, not compiled": "low-memory 8B, --no_compile",
    "low-memory SmolLM2": "low-memory SmolLM2, --no_compile, eager update",
}


def make_folder(shape, tokenizer, folder):
    """A model folder with config and tokenizer; its weights file is a stand-in that `random_model` never reads."""
    from transformers import AutoTokenizer, LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    LlamaConfig(**SHAPES[shape], rope_parameters=rope, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").touch()


def meta_model(name, dtype):
    """A Llama whose parameters are on the meta device, its rotations real; seeds what then makes the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def random_model(name, dtype):
    """Stands in for weights.load: random weights in host memory, made on the GPU in parts of 64 MiB."""
    model, made = meta_model(name, dtype), {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = torch.nn.Parameter(torch.ones(p.shape, dtype=dtype))
                for part in made[id(p)].data.split(max(1, 2**25 // p.shape[-1])) if p.ndim > 1 else []:
                    part.copy_(0.02 * torch.randn(part.shape, dtype=dtype, device="cuda"))
            if p is not None:
                module._parameters[key] = made[id(p)]
    model.tie_weights()
    torch.cuda.empty_cache()
    return model


def machine():
    """What a figure depends on beside our code, for the results."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver.stdout.split("\n")[0],
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
    }


def device_gib():
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


class Stopwatch:
    """Wraps Run.after_step: times the middle steps of a run and profiles the last."""

    def __init__(self, before, timed, profiled):
        self.first, self.last, self.profiled = before, before + timed, profiled
        self.stamps, self.losses, self.kernels, self.context, self.tokens = [], [], {}, None, 0
        self.plain, Run.after_step = Run.after_step, lambda run, loss: self.step(run, loss)

    def step(self, run, loss):
        self.plain(run, loss)
        self.losses.append(loss)
        self.tokens, self.lm = max(self.tokens, run.batch.ids.numel()), run.lm
        self.layout = run.data.layout.NAME
        step = run.progress["step"]
        if step in (self.first, self.last):
            torch.cuda.synchronize()
            counts = (run.progress[name] for name in ("rows", "tokens", "target_tokens"))
            self.stamps.append((time.perf_counter(), *counts))
        if step == self.last and self.profiled:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        if step == self.last + self.profiled and self.profiled:
            torch.cuda.synchronize()
            self.context = device_gib() - torch.cuda.memory_reserved() / GIB
            self.profiler.__exit__(None, None, None)
            self.updated = sum(parallel.own_rows(p).numel() for p in run.lm.trained.values())
            for event in self.profiler.key_averages():
                self.kernels[event.key] = (event.device_time_total / 1000 / self.profiled, event.count / self.profiled)

    def result(self):
        (start, rows, tokens, targets), (end, rows_after, tokens_after, targets_after) = self.stamps
        steps, seconds = self.last - self.first, end - start
        found = {
            "rows_per_second": (rows_after - rows) / seconds,
            "tokens_per_second": (tokens_after - tokens) / seconds,
            "target_tokens_per_second": (targets_after - targets) / seconds,
            "ms_per_step": 1000 * seconds / steps,
            "losses": [round(loss.item(), 4) for loss in self.losses],
            "layout": self.layout,
        }
        if self.kernels:
            busy = sum(ms for ms, _ in self.kernels.values())
            update = sum(self.kernels.get(name, (0, 0))[0] for name in UPDATE_KERNELS)
            if update:  # bytes that an update must move, over the time of its kernels
                found["update_ms_per_step"], found["update_tb_per_s"] = update, 12 * self.updated / update / 1e9
            found |= {
                "busy_ms_per_step": busy,
                "wall_over_busy": found["ms_per_step"] / busy,
                "kernels_per_step": sum(count for ms, count in self.kernels.values() if ms),
                "longest_kernels": [
                    {"name": name[:80], "ms_per_step": round(ms, 3), "count": round(count, 1)}
                    for name, (ms, count) in sorted(self.kernels.items(), key=lambda item: -item[1][0])[:20]
                ],
                "context_gib": self.context,
            }
        return found


def activations_gib(config, tokens):
    """What a bf16 layer-checkpointed step of a Llama must keep at its widest moment, counted from the shapes.

    Each layer's input; and within one layer, run again: queries, keys, values and their rotated copies, attention's
    output, four copies of the width (norms and residuals), and of the MLP gate, up, product and two gradients.
    """
    heads = config.num_attention_heads
    kept = config.num_hidden_layers * config.hidden_size
    keys = config.hidden_size * config.num_key_value_heads // heads
    inside = 2 * (config.hidden_size + keys) + keys + 5 * config.hidden_size + 5 * config.intermediate_size
    return 2 * tokens * (kept + inside) / GIB


def ledger(summary, config, tokens, context, buffers):
    """{part: GiB} of the card at the training phase's peak, and what of it is not explained, as a share."""
    peak = summary["memory_gib"]["train"]
    parts = {name: gib for name, gib in summary["ledger_gib"].items() if name != "the rest"}
    activations = activations_gib(config, tokens)
    # Of a tied, trained weight two gradients exist until they are added: the head's and the embeddings', when the layers
    # are done
    if summary["args"]["trained"] == "all" and config.tie_word_embeddings and parts["largest gradient"] > activations:
        parts["the tied weight's other gradient"] = parts["largest gradient"]
    else:
        parts["activations"] = activations
    if buffers:
        parts["buffers of a streamed head"] = buffers
    parts["CUDA context and graphs"] = context
    parts["the allocator's slack"] = peak["reserved"] - peak["allocated"]
    rest = peak["device"] - sum(parts.values())
    return parts | {"unexplained": rest, "unexplained share": rest / peak["device"]}


def worker(name, args):
    """Run one case in this process; print its result as the last line."""
    script, shape, flags, (before, timed, profiled), card = ALL_CASES[name]
    module = __import__(script)
    stopwatch = Stopwatch(before, timed, profiled)
    checkpoint.save = lambda *args: None
    cuda_graphs.GRAPHS_PAY_STEPS = 0  # as in a run of 65 steps or more
    plain = "not compiled" in name or name in BUDGETS  # otherwise as in a run of 8,000 steps or more
    cuda_graphs.COMPILING_PAYS_STEPS = 10**9 if plain else 0
    other = {"fused": False} if "eager update" in name else {}
    other |= {"seed": 1} if "other rounding noise" in name else {}

    class Adafactor(adafactor.Adafactor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | other)

    module.Adafactor = Adafactor
    with tempfile.TemporaryDirectory() as folder:
        model = args.tokenizer
        if shape:
            weights.load, model = random_model, f"{folder}/model"
            make_folder(shape, args.tokenizer, Path(model))
        argv = ["--run-name", "x", "--output_dir", folder, "--model", str(model), "--dataset", args.dataset]
        argv += [
            "--eval_rows",
            "200",
            "--log_every",
            "20",
            "--no_save_model",
            "--schedule",
            "constant",  # as the peers have it, so that losses compare
            "--max_steps",
            str(before + timed + profiled),
        ]
        flags = [*flags, *(["--memory_budget", str(card)] if card else [])]
        summary = module.main([*argv, *flags])
    result = {
        "case": name,
        "commit": args.commit,
        "shape": shape,
        "flags": flags,
        "batch_size": summary["args"]["batch_size"],
        "card_gib": card,
    }
    result |= stopwatch.result()
    kept = (
        "memory_gib", "trained_params", "total_params", "eval", "train_seconds", "seconds_to_first_step", "skipped_updates", "versions",
    )  # fmt: skip
    result |= {key: summary[key] for key in kept} | {"machine": machine()}
    if stopwatch.context is not None and script == "finetune_lowmem":
        from transformers import LlamaConfig

        buffers = getattr(stopwatch.lm.head, "buffers", None)
        buffers = 0 if buffers is None else buffers.nbytes / GIB
        config = LlamaConfig(**SHAPES[shape])
        result["ledger_gib"] = ledger(summary, config, stopwatch.tokens, stopwatch.context, buffers)
    print("\n" + json.dumps(result))


def copy_bandwidth():
    """TB/s of a large device-to-device copy, bytes read plus bytes written; median of 20."""
    source = torch.randn(2**29, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times[3:]) / 1e9


def update_bandwidth():
    """Adafactor's kernels alone on Llama's matrices: {shape: [microseconds, TB/s at 12 bytes an element]}."""
    found = {}
    for shape in [(8192, 2048), (2048, 2048), (512, 2048), (14336, 4096), (4096, 4096), (1024, 4096), (128256, 2048)]:
        # several tensors in turn, 400 MB of them, so that the cache of 50 MB does not hold them from update to update
        count = max(2, 10**8 // (shape[0] * shape[1]))
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16()) for _ in range(count)]
        optimizer = adafactor.Adafactor(params, lr=1e-4)
        for p in params:
            p.grad = torch.randn_like(p)
        with torch.cuda.stream(torch.cuda.Stream()):
            optimizer.step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                optimizer.step()
            times = []
            for _ in range(10):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / count)
        ms = statistics.median(times)
        found["x".join(map(str, shape))] = [round(1000 * ms, 1), round(12 * params[0].numel() / ms / 1e9, 3)]
        del params, optimizer, graph
        torch.cuda.empty_cache()
    return found


def loss_differences(cases):
    """Lines that compare the losses of single steps of two cases, which see the same batches."""
    losses = {case["case"]: case["losses"] for case in cases if "losses" in case}
    for name, yardstick in YARDSTICKS.items():
        if name in losses and yardstick in losses:
            differences = [a - b for a, b in zip(losses[name], losses[yardstick], strict=False)]
            yield (
                f"{name} minus {yardstick}, loss in nats over {len(differences)} steps: "
                f"mean {statistics.mean(differences):.4f}, largest {max(map(abs, differences)):.4f}"
            )


def update_shares(found):
    """Lines that compare the update's kernels, in the profiled steps, with a copy."""
    for case in found["cases"]:
        if "update_tb_per_s" in case and "kernels" in found:
            share = case["update_tb_per_s"] / found["kernels"]["copy_tb_per_s"]
            yield (
                f"{case['case']}: the update takes {case['update_ms_per_step']:.1f} of {case['busy_ms_per_step']:.1f} ms, "
                f"at {100 * share:.0f} % of a copy's bandwidth"
            )


def plan(output):
    """{layers_on_gpu, predicted_gib} as a run of finetune_lowmem.py said them; {} if it did not."""
    said = re.search(r"(\d+) of \d+ decoder layers on the GPU.*predicted peak ([\d.]+)", output, re.DOTALL)
    return {"layers_on_gpu": int(said[1]), "predicted_gib": float(said[2])} if said else {}


def commit():
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True, help="JSON; cases that it already holds are replaced, others kept")
    parser.add_argument("--commit", default=commit(), help="recorded in the results; asked of git if left out")
    parser.add_argument("--only", nargs="+", default=["kernels", *ALL_CASES], choices=["kernels", *ALL_CASES])
    parser.add_argument("--case", choices=["kernels", *ALL_CASES], help="run this case in this process")
    args = parser.parse_args()
    if args.case == "kernels":
        found = {"copy_tb_per_s": round(copy_bandwidth(), 3), "update_us_and_tb_per_s": update_bandwidth()}
        print(json.dumps(found | {"machine": machine()}))
        return
    if args.case is not None:
        worker(args.case, args)
        return
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.exists() else {"cases": []}
    if "kernels" in args.only:  # in a process of its own, whose CUDA context ends with it
        command = [sys.executable, __file__, *sys.argv[1:], "--case", "kernels"]
        kernels = json.loads(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1])
        found["kernels"] = kernels | {"commit": args.commit}
        print(kernels, flush=True)
        out.write_text(json.dumps(found, indent=1))
    print(
        f"{'':48}{'batch':>6}{'allocated':>10}{'reserved':>9}{'device':>8}{'(eval)':>8}{'rows/s':>8}{'ms/step':>8}{'busy':>7}{'ratio':>6}{'first':>6}{'planned':>8}"
    )
    for case in [name for name in args.only if name != "kernels"]:
        began = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}", flush=True)
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
            failed = {"case": case, "commit": args.commit, "failed": reason}
            found["cases"] = [c for c in found["cases"] if c["case"] != case] + [failed]
            out.write_text(json.dumps(found, indent=1))
            continue
        r = json.loads(done.stdout.splitlines()[-1]) | {"whole_run_seconds": time.perf_counter() - began}
        r |= plan(done.stdout)
        found["cases"] = [c for c in found["cases"] if c["case"] != case] + [r]
        out.write_text(json.dumps(found, indent=1))
        train, evaluation = r["memory_gib"]["train"], r["memory_gib"]["eval"]
        print(
            f"{case:<48}{r['batch_size']:>6}{train['allocated']:>10.2f}{train['reserved']:>9.2f}{train['device']:>8.2f}"
            f"{evaluation['device']:>8.2f}{r['rows_per_second']:>8.1f}{r['ms_per_step']:>8.1f}{r.get('busy_ms_per_step', 0):>7.1f}"
            f"{r.get('wall_over_busy', 0):>6.2f}{r['seconds_to_first_step']:>6.0f}"
            f"{r.get('predicted_gib', 0):>8.2f}",
            flush=True,
        )
    print(*loss_differences(found["cases"]), *update_shares(found), sep="\n")
    if any("failed" in c for c in found["cases"] if c["case"] in args.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
