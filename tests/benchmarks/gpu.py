"""Memory and speed of both scripts on one GPU: random weights in the exact Llama shapes, real shuffled HellaSwag rows.

    python tests/benchmarks/gpu.py --tokenizer MODEL_FOLDER --dataset DATASET_FOLDER --out results.json

The folders are the demo's, in ~/.cache/lowmem_finetuning (run a --demo once). Each case is the real script in a process
of its own, training and evaluation included; only the weights are made on the GPU instead of read, and no checkpoint is
written. SmolLM2's tokenizer stands in for Llama's: its ids are a part of Llama's vocabulary, and rows come out about as
long. rows/s is that of the last two thirds of the steps: the first third pays for compiling and autotuning kernels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import common

LLAMA = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_attention_heads": 32, "num_key_value_heads": 8,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = {
    "1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
CASES = [
    ("finetune_lowmem", "1B", ["--max_steps", "120"]),
    ("finetune_lowmem", "1B", ["--max_steps", "120", "--trained", "all"]),
    ("finetune_base", "1B", ["--max_steps", "45"]),
    ("finetune_base", "1B", ["--max_steps", "60", "--optimizer", "Adafactor", "--batch_size", "8"]),
    ("finetune_lowmem", "8B", ["--max_steps", "45"]),
]


def make_folder(shape, tokenizer, folder):
    """A model folder with config and tokenizer; its weights file is a stand-in that `random_model` never reads."""
    from transformers import AutoTokenizer, LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    LlamaConfig(**SHAPES[shape], rope_parameters=rope, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").touch()


def random_model(name, dtype):
    """Stands in for common.load_model: random weights made on the GPU; untied embeddings in host memory, as if read there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        model.get_input_embeddings().cpu()
    return model


def worker(script, shape, flags, args):
    """Run one case in this process; print its result as the last line."""
    stamps = []
    plain_step = common.Run.after_step

    def timed_step(run, loss, batch):
        plain_step(run, loss, batch)
        if run.progress["step"] in (run.args.max_steps // 3, run.args.max_steps):
            torch.cuda.synchronize()
            stamps.append((time.perf_counter(), run.progress["rows"], run.progress["step"]))

    common.Run.after_step, common.load_model = timed_step, random_model
    common.save_checkpoint = lambda *args: None
    with tempfile.TemporaryDirectory() as folder:
        make_folder(shape, args.tokenizer, Path(folder) / "model")
        argv = ["--run-name", "x", "--output_dir", folder, "--model", f"{folder}/model", "--dataset", args.dataset]
        summary = __import__(script).main([*argv, "--eval_rows", "200", "--log_every", "5", "--no_save_model", *flags])
    (start, rows_before, steps_before), (end, rows, steps) = stamps
    result = {"script": script, "shape": shape, "flags": flags, "batch_size": summary["args"]["batch_size"]}
    result |= {
        "rows_per_second": (rows - rows_before) / (end - start),
        "seconds_per_step": (end - start) / (steps - steps_before),
    }
    kept = (
        "memory_gib",
        "ledger_gib",
        "trained_params",
        "total_params",
        "eval",
        "train_seconds",
        "skipped_updates",
        "versions",
    )
    print("\n" + json.dumps(result | {name: summary[name] for name in kept}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)), help="run only these of the cases")
    parser.add_argument("--case", type=int, help="run this case in this process")
    args = parser.parse_args()
    if args.case is not None:
        return worker(*CASES[args.case], args)
    results = []
    for number in args.only:
        script, shape, flags = CASES[number]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--case", str(number)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"{script} {shape} {flags} failed:\n{done.stderr[-3000:]}")
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]) | {"whole_run_seconds": time.perf_counter() - began})
        Path(args.out).write_text(json.dumps(results, indent=1))
    print(
        f"{'':44}{'batch':>6}{'allocated':>10}{'reserved':>10}{'device GiB':>11}{'(eval)':>8}{'rows/s':>8}{'ms/step':>8}"
    )
    for r in results:
        train, evaluation = r["memory_gib"]["train"], r["memory_gib"]["eval"]
        print(
            f"{r['script'] + ' ' + r['shape'] + ' ' + ' '.join(r['flags'][2:]):<44}{r['batch_size']:>6}{train['allocated']:>10.2f}{train['reserved']:>10.2f}"
            f"{train['device']:>11.2f}{evaluation['device']:>8.2f}{r['rows_per_second']:>8.1f}{1000 * r['seconds_per_step']:>8.0f}"
        )
    return None


if __name__ == "__main__":
    main()
