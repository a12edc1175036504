"""A long run of the low-memory script at 1B shapes on one GPU: do memory or speed drift, and what does saving take?

    python tests/benchmarks/soak.py --tokenizer MODEL_FOLDER --dataset DATASET_FOLDER --out results.json

Folders and weights as in gpu.py: the demo's, and random weights made on the GPU. The real script, with real evaluations and
checkpoints (of the size of the real ones) in between; one case with its weights on the GPU, one with layers streamed from
host memory. Compared are step 100 and the last; speed is that of each 300 steps' training alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from gpu import machine, make_folder, random_model

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune_lowmem
from lowmem.training import checkpoint, evaluation, weights
from lowmem.training.memory import GIB
from lowmem.training.run import Run

STEPS, WINDOW = 2200, 300
CASES = {"resident": [], "streamed within 1.7 GiB": ["--memory_budget", "1.7"]}


class Watch:
    """Wraps Run.after_step and checkpoint.save: times steps, looks at memory at step 100 and at the end."""

    def __init__(self):
        self.memory, self.speeds, self.saves, self.pause = [], [], [], 0.0
        self.after_step, Run.after_step = Run.after_step, lambda *args: self.step(*args)
        self.save_checkpoint, checkpoint.save = checkpoint.save, lambda *args: self.save(*args)
        self.evaluate, evaluation.evaluate = evaluation.evaluate, lambda *args: self.paused(self.evaluate, *args)

    def step(self, run, *args):
        self.after_step(run, *args)
        done = run.progress["step"]
        if done in (100, STEPS):
            self.memory.append(
                {
                    "step": done,
                    "allocated": torch.cuda.memory_allocated(),
                    "reserved": torch.cuda.memory_reserved(),
                    "host": psutil.Process().memory_info().rss,
                }
            )
        if done >= 100 and (done - 100) % WINDOW == 0:
            torch.cuda.synchronize()
            now = time.perf_counter(), run.progress["rows"]
            if done > 100:
                self.speeds.append((now[1] - self.since[1]) / (now[0] - self.since[0] - self.pause))
            self.since, self.pause = now, 0.0

    def paused(self, function, *args):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(*args)
        torch.cuda.synchronize()
        self.pause += time.perf_counter() - start
        return result

    def save(self, run_dir, *args):
        """Host memory during a save: the most that the process held, sampled by the kernel (VmHWM), above before."""
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        self.paused(self.save_checkpoint, run_dir, *args)
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        size = sum(f.stat().st_size for f in checkpoint.last(run_dir).iterdir())
        more = (1024 * int(peak.split()[1]) - before) / GIB
        self.saves.append({"gib": size / GIB, "seconds": time.perf_counter() - start, "host_gib_more": more})


def worker(name, args):
    """Run one case in this process; print its result as the last line."""
    weights.load, watch = random_model, Watch()
    with tempfile.TemporaryDirectory() as folder:
        make_folder("1B", args.tokenizer, Path(folder) / "model")
        argv = ["--run-name", "x", "--output_dir", folder, "--model", f"{folder}/model", "--dataset", args.dataset]
        argv += ["--eval_rows", "100", "--log_every", "100", "--save_every", "1100", "--no_save_model", *CASES[name]]
        argv += ["--max_steps", str(STEPS)]
        summary = finetune_lowmem.main(argv)
        (Path(folder) / "x" / "summary.json").unlink()  # or the run is finished
        start = time.perf_counter()
        checkpoint.check_resume(finetune_lowmem.parse([*argv, "--resume"]), Path(folder) / "x")
        checked = (time.perf_counter() - start) / 2  # parsing checks too
    first, last = watch.memory
    result = {"case": name, "commit": args.commit, "steps": summary["steps"], "memory": watch.memory}
    result |= {f"{key}_delta": last[key] - first[key] for key in ("allocated", "reserved", "host")}
    result |= {"host_delta_percent": 100 * (last["host"] / first["host"] - 1), "rows_per_second": watch.speeds}
    third = len(watch.speeds) // 3
    drift = statistics.mean(watch.speeds[-third:]) / statistics.mean(watch.speeds[:third]) - 1
    result |= {"speed_drift_percent": 100 * drift, "saves": watch.saves, "seconds_to_check": checked}
    kept = ("memory_gib", "skipped_updates", "versions")
    print("\n" + json.dumps(result | {key: summary[key] for key in kept} | {"machine": machine()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args)
    else:
        compare(args)


def compare(args):
    """Run all cases, write the results and print what drifted."""
    results = []
    for name in CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name, *sys.argv[1:]], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            results.append({"case": name, "commit": args.commit, "failed": done.stdout[-2000:]})
        else:
            results.append(json.loads(done.stdout.splitlines()[-1]))
        args.out.write_text(json.dumps(results, indent=1))
    for r in results:
        if "failed" in r:
            print(r)
            continue
        print(
            f"{r['case']}: step 100 to {r['steps']}: allocated {r['allocated_delta']:+d} bytes, reserved "
            f"{r['reserved_delta']:+d}, host {r['host_delta_percent']:+.2f} %, rows/s {r['speed_drift_percent']:+.1f} %"
        )
        for save in r["saves"]:
            print("  saved", {key: round(value, 2) for key, value in save.items()})
        print("  rows/s", [round(x, 1) for x in r["rows_per_second"]], "check", round(r["seconds_to_check"], 1))


if __name__ == "__main__":
    main()
