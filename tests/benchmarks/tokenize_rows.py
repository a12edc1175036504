"""Rows a second from a file of conversations to sequences, ours and datasets.map's with the same template and tokenizer.

    python tests/benchmarks/tokenize_rows.py --tokenizer FOLDER [--rows 20000]

Rows have 20 to 4,000 tokens (log-normal, some 250 in the middle), 2 to 6 turns, words from a seeded list. Of
datasets.map the masks are not asked, and its rows are kept as they come; ours are read from the file, checked, rendered
up to six times, tokenized and masked. Also the memory of the process, before and at its peak.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem.data import own

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "people",
    "river",
    "mountain",
    "understanding",
)


def conversation(rng):
    """A row of messages."""
    turns = rng.choice([2, 4, 6])
    words = int(min(4000, max(20, rng.lognormvariate(5.5, 1)))) // turns
    contents = (" ".join(rng.choices(WORDS, k=max(1, words))) for _ in range(turns))
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]}


def peak_gib():
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(file, tokenizer):
    """(Seconds, tokens, GiB more than before) of reading the file as a run does."""
    args = SimpleNamespace(
        dataset=str(file), train_rows=None, eval_rows=None, epochs=1, max_steps=None, batch_size=8, seed=0,
        max_length=None, train_on="answers", date="2026-01-01",
    )  # fmt: skip
    before, start = peak_gib(), time.perf_counter()
    data = own.load(args, tokenizer, max_tokens=10**6)
    return time.perf_counter() - start, sum(len(s.ids) for s in (*data.train, *data.scored)), peak_gib() - before


def by_map(file, tokenizer, scratch):
    """(Seconds, tokens) of datasets.map over the same file."""
    import datasets

    def tokenize(batch):
        return {"ids": tokenizer.apply_chat_template(batch["messages"])["input_ids"]}

    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=scratch)
    read = time.perf_counter()
    rows = rows.map(tokenize, batched=True, num_proc=len(os.sched_getaffinity(0)), remove_columns=["messages"])
    return time.perf_counter() - start, time.perf_counter() - read, sum(map(len, rows["ids"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--rows", type=int, default=20_000)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(args.tokenizer), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        with open(file, "w") as out:
            out.writelines(json.dumps(conversation(rng)) + "\n" for _ in range(args.rows))
        seconds, tokens, gib = ours(file, tokenizer)
        print(f"ours: {args.rows / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s, {gib:.2f} GiB more memory")
        whole, mapped, tokens = by_map(file, tokenizer, scratch)
        print(f"datasets.map: {args.rows / mapped:,.0f} rows/s, {tokens / mapped:,.0f} tokens/s; with reading "
              f"{args.rows / whole:,.0f} rows/s")  # fmt: skip
        print(f"ours / datasets.map: {mapped / seconds:.2f}; both with reading: {whole / seconds:.2f}")


if __name__ == "__main__":
    main()
