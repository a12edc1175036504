"""What saving a model and reading it back cost: seconds, and host memory of this process beside the model.

    python tests/benchmarks/read_back.py --tokenizer MODEL_FOLDER --out results.json
    python tests/benchmarks/read_back.py --report results.json

On a GPU, random bf16 weights in the exact Llama shapes, and a mixture of 16 experts, whose merged matrices transformers
writes to the disk for the while; `saved_model.save` and `read_back` as at the end of a run. What is read has
just been written, so it comes from the page cache; `disk GiB/s` is how fast this disk reads it without.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import torch
from gpu import SHAPES, machine, make_folder, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from lowmem.training import checkpoint, records, saved_model
from lowmem.training.memory import GIB

EXPERTS = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


class Peak(threading.Thread):
    """Largest anonymous memory of this process while it runs, in GiB beyond that at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes, self.most, self.ended = anonymous_bytes(), 0, threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(0.01):
            self.most = max(self.most, anonymous_bytes())

    def gib(self):
        self.ended.set()
        self.join()
        return max(0, self.most - self.start_bytes) / GIB


def anonymous_bytes():
    """Bytes of host memory that are no file's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def make_model(shape, tokenizer, folder):
    """The model in GPU memory, where a run that streams nothing has it; what else belongs to it is in `folder`."""
    if shape in SHAPES:
        make_folder(shape, tokenizer, folder)
        return random_model(folder, torch.bfloat16).to("cuda")
    config = MixtralConfig(**EXPERTS)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def disk_gib_per_second(files):
    """Speed of reading the files once the page cache has let go of them."""
    for file in files:
        with open(file, "rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, size = time.perf_counter(), 0
    for file in files:
        with open(file, "rb", buffering=0) as content:
            while chunk := content.read(2**25):
                size += len(chunk)
    return size / GIB / (time.perf_counter() - start)


def measure(shape, tokenizer, folder):
    (folder / "source").mkdir()
    model, tokenizer = make_model(shape, tokenizer, folder / "source"), AutoTokenizer.from_pretrained(folder / "source")
    origin, saved = saved_model.Origin.of(folder / "source"), folder / "saved"
    start = time.perf_counter()
    saved_model.save(saved, model, tokenizer, origin)
    checkpoint.flush_all(saved)
    middle, peak = time.perf_counter(), Peak()
    _, size = saved_model.read_back(saved, model, tokenizer)
    end = time.perf_counter()
    return {
        "model": shape,
        "gib": round(size / GIB, 2),
        "save_seconds": round(middle - start, 1),
        "read_back_seconds": round(end - middle, 1),
        "host_gib": round(peak.gib(), 2),
        "disk_gib_per_second": round(disk_gib_per_second(list(saved.glob("*.safetensors"))), 2),
    }


def report(cases):
    """The cases as a table in Markdown."""
    columns = ["gib", "save_seconds", "read_back_seconds", "host_gib", "disk_gib_per_second"]
    heads = ["GiB", "save, s", "read back, s", "host memory for that, GiB", "the disk alone, GiB/s"]
    lines = [["", *heads], ["---"] * 6, *([case["model"], *(str(case[name]) for name in columns)] for case in cases)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a model, for its tokenizer")
    parser.add_argument("--out", help="file for the results")
    parser.add_argument("--report", metavar="FILE", help="print those results instead")
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(Path(args.report).read_text())["cases"]))
        return
    cases = []
    for shape in ("1B", "8B", "16 experts"):
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measure(shape, args.tokenizer, Path(folder)))
        torch.cuda.empty_cache()
    results = {"machine": machine() | records.versions(torch.device("cuda")), "cases": cases}
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    print(report(cases))


if __name__ == "__main__":
    main()
