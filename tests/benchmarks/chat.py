"""Conversations of real lengths: ours and TRL's SFTTrainer on the same rows, on one GPU: memory and tokens a second.

    pip install trl
    python tests/benchmarks/chat.py --tokenizer MODEL_FOLDER --out results.json

Random weights in the exact Llama-3.1-8B shape, decoder layers trained, in bf16. Rows are made: 20 to 4,000 words
(log-normal, some 250 in the middle) in two to six turns, under the chat template of --tokenizer. Ours are the cases of
gpu.py. TRL is set up for least memory, as its documentation has it: gradient checkpointing, optim="adafactor", bf16,
Liger's loss if that package is there; padded with 8 rows a step, or packed to as many tokens as ours has a step. It
trains every token, we the assistant's: the logits of all are made in its loss either way, so that its target tokens a
second are given as the same share of its tokens. The dry runs are the script's own, from start to exit, without weights.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import gpu
import tokenize_rows

from lowmem.training import models
from lowmem.training.memory import GIB

OURS = ["low-memory 8B, not compiled, whole card", "8B, batch 8, 6 GiB"]
TRL = {"TRL, padded, 8 rows": {"rows": 8, "packing": False}, "TRL, packed": {"rows": 1, "packing": True}}
DRY = {"dry run": [], "dry run, 6 GiB": ["--memory_budget", "6"]}
BEFORE, TIMED = 6, 16  # steps of TRL before those that are timed, and those
MAX_LENGTH = 4096


def write_rows(file, count):
    """Write made conversations, the same ones each time."""
    rng = random.Random(0)
    with open(file, "w") as out:
        out.writelines(json.dumps(tokenize_rows.conversation(rng)) + "\n" for _ in range(count))


def time_dry_run(case, args, rows):
    """The result of a dry run of finetune_lowmem.py, `seconds` from start to exit. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        gpu.make_folder(args.shape, args.tokenizer, Path(folder, "model"))
        argv = ["--run-name", "x", "--output_dir", folder, "--model", f"{folder}/model", "--dataset", rows, "--dry_run"]
        script = Path(__file__).parents[2] / "finetune_lowmem.py"
        command = [sys.executable, script, *argv, "--eval_rows", "200", *DRY[case]]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    found = {"case": case, "commit": args.commit, "rows": args.rows, "seconds": seconds, "machine": gpu.machine()}
    return found | gpu.plan(done.stdout)


def train_with_trl(case, args):
    """Run a case of TRL in this process; print its result as the last line."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    tokenizer, how = transformers.AutoTokenizer.from_pretrained(args.tokenizer), TRL[case]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        gpu.make_folder(args.shape, args.tokenizer, Path(folder))
        model = gpu.random_model(folder, torch.bfloat16).cuda()
    models.choose_trained(model, "layers")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stamps, tokens, rows, step = {}, {0: 0}, {0: 0}, 0

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            nonlocal step
            step += 1
            if step in (1, BEFORE, BEFORE + TIMED):
                torch.cuda.synchronize()
                stamps[step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, max_length=MAX_LENGTH, packing=how["packing"], per_device_train_batch_size=how["rows"],
            gradient_checkpointing=True, optim="adafactor", bf16=True, max_steps=BEFORE + TIMED, save_strategy="no",
            report_to=[], disable_tqdm=True, logging_steps=10**6, lr_scheduler_type="constant", learning_rate=1e-5,
            use_liger_kernel=importlib.util.find_spec("liger_kernel") is not None,
        )  # fmt: skip
        data = datasets.load_dataset("json", data_files=args.dataset, split="train", cache_dir=folder)
        trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()])
        collate = trainer.data_collator

        def count(examples):
            tokens[len(tokens)] = sum(len(example["input_ids"]) for example in examples)
            rows[len(rows)] = sum(len(example.get("seq_lengths", [1])) for example in examples)
            return collate(examples)

        trainer.data_collator = count
        trainer.train()
    seconds = stamps[BEFORE + TIMED] - stamps[BEFORE]
    timed = range(BEFORE + 1, BEFORE + TIMED + 1)  # batches are made in order, in this process
    memory = {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
        "device": gpu.device_gib() + (torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()) / GIB,
    }
    versions = {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")}
    result = {
        "case": case,
        "rows_per_second": sum(rows[k] for k in timed) / seconds,
        "tokens_per_second": sum(tokens[k] for k in timed) / seconds,
        "memory_gib": {"train": memory},
        "attention": model.config._attn_implementation,
        "liger": settings.use_liger_kernel,
        "versions": versions | {"device": torch.cuda.get_device_name()},
        "machine": gpu.machine(),
    }
    print("\n" + json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--out", required=True, help="JSON; cases that it already holds are replaced, others kept")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shape", default="8B", choices=[*gpu.SHAPES], help="of TRL's cases and of dry runs")
    parser.add_argument("--only", nargs="+", default=[*OURS, *TRL, *DRY], choices=[*gpu.ALL_CASES, *TRL, *DRY])
    parser.add_argument("--commit", default=gpu.commit())
    parser.add_argument("--case", choices=[*TRL], help="run this case in this process")
    parser.add_argument("--dataset", help="of --case")
    args = parser.parse_args()
    if args.case:
        train_with_trl(args.case, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = f"{folder}/rows.jsonl"
        write_rows(rows, args.rows)
        ours = [case for case in args.only if case not in TRL | DRY]
        where = ["--tokenizer", args.tokenizer, "--dataset", rows, "--out", args.out, "--commit", str(args.commit)]
        if ours:
            subprocess.run([sys.executable, Path(__file__).parent / "gpu.py", *where, "--only", *ours], check=True)
        out = Path(args.out)
        found = json.loads(out.read_text()) if out.exists() else {"cases": []}

        def keep(result):
            found["cases"] = [c for c in found["cases"] if c["case"] != result["case"]] + [result]
            out.write_text(json.dumps(found, indent=1))

        for case in (case for case in args.only if case in DRY):
            keep(time_dry_run(case, args, rows))
        for case in (case for case in args.only if case in TRL):
            command = [sys.executable, __file__, *where, "--shape", args.shape, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
            r = {"case": case, "failed": reason} if done.returncode else json.loads(done.stdout.splitlines()[-1])
            if done.returncode:
                print(done.stderr[-3000:])
            elif of_ours := next((c for c in found["cases"] if c["case"] in OURS), None):
                share = of_ours["target_tokens_per_second"] / of_ours["tokens_per_second"]
                r["target_tokens_per_second"] = share * r["tokens_per_second"]
            keep(r | {"commit": args.commit})
    for c in found["cases"]:
        if "failed" in c:
            print(f"{c['case']:<40} failed: {c['failed']}")
            continue
        if c["case"] in DRY:
            print(f"{c['case']:<40}{c['predicted_gib']:>7.2f} GiB predicted, {c['seconds']:.0f} s")
            continue
        print(
            f"{c['case']:<40}{c['memory_gib']['train']['device']:>7.2f} GiB{c['rows_per_second']:>8.2f} rows/s"
            f"{c['tokens_per_second']:>8.0f} tokens/s{c.get('target_tokens_per_second', 0):>8.0f} target tokens/s"
        )


if __name__ == "__main__":
    main()
