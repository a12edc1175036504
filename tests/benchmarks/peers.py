"""Other ways to fine-tune all weights in little memory, each as its own users set it up, on one GPU.

    pip install bitsandbytes flashoptim lomo-optim galore-torch torchao
    python tests/benchmarks/peers.py --tokenizer MODEL_FOLDER --dataset DATASET_FOLDER --out peers.json

The same rows in the same order as `gpu.py`'s cases, batch 8, decoder layers trained, gradient checkpointing, the model's
own loss. Shapes 1B and 8B: random weights, for memory and speed. SmolLM2 (the model in --tokenizer): held-out gold NLL
after the rows, each at the learning rate that its function names, which is not tuned here. A peer that is not installed is reported
as missing, one that does not fit or fails with the reason.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as ours: less memory lost in gaps
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that asking for a GPU does not start CUDA before the fork

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import gpu

import common
from lowmem.training import evaluation, heads, models, weights
from lowmem.training.batches import IGNORE
from lowmem.training.memory import GIB


def trainer_adafactor(model, batches, after_step):
    """Hugging Face Trainer, optim="adafactor", its default learning rate of 5e-5."""

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            after_step()

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, optim="adafactor", bf16=True, gradient_checkpointing=True, max_steps=len(batches), save_strategy="no",
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", logging_steps=10**6, max_grad_norm=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=batches, callbacks=[Steps()]).train()


def plain_loop(model, batches, after_step, step):
    """The loop of all others: loss, then `step(loss)`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batch in batches:
        step(model(**{name: t.cuda() for name, t in batch.items()}, use_cache=False).loss)
        after_step()


def step_in_backward(model, make):
    """torchtune's optimizer_in_bwd: an optimizer a parameter, stepped by a hook."""
    optimizers = {p: make(p) for p in model.parameters() if p.requires_grad}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)


def bitsandbytes_paged(model, batches, after_step):
    """torchtune's single-device recipe: PagedAdamW8bit in backward, 2e-5."""
    import bitsandbytes

    step_in_backward(model, lambda p: bitsandbytes.optim.PagedAdamW8bit([p], lr=2e-5))
    plain_loop(model, batches, after_step, torch.Tensor.backward)


def flashoptim_release(model, batches, after_step):
    """FlashAdamW with gradient release, 24-bit master weights, 2e-5."""
    import flashoptim

    optimizer = flashoptim.FlashAdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-5, master_weight_bits=24
    )
    flashoptim.enable_gradient_release(model, optimizer)
    plain_loop(model, batches, after_step, torch.Tensor.backward)


def adalomo(model, batches, after_step):
    """AdaLomo, 5e-4 as its authors suggest."""
    import lomo_optim

    optimizer = lomo_optim.AdaLomo(model, lr=5e-4)
    plain_loop(model, batches, after_step, lambda loss: optimizer.fused_backward(loss, 5e-4))


def galore_layerwise(model, batches, after_step):
    """GaLoreAdamW8bit in backward (its per-layer mode), with its published fine-tuning recipe: rank 4, scale 4, 3e-5."""
    import galore_torch

    def make(p):
        group = {"params": [p]}
        if p.ndim > 1:
            group |= {"rank": 4, "update_proj_gap": 500, "scale": 4.0, "proj_type": "std"}
        return galore_torch.GaLoreAdamW8bit([group], lr=3e-5)

    step_in_backward(model, make)
    plain_loop(model, batches, after_step, torch.Tensor.backward)


def torchao_stochastic(model, batches, after_step):
    """torchao's AdamW on bf16 weights with stochastic rounding, 2e-5."""
    import torchao.optim

    optimizer = torchao.optim._AdamW(
        [p for p in model.parameters() if p.requires_grad], 2e-5, bf16_stochastic_round=True
    )

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    plain_loop(model, batches, after_step, step)


PEERS = {
    "HF Trainer, adafactor": ("transformers", trainer_adafactor),
    "bitsandbytes PagedAdamW8bit in backward": ("bitsandbytes", bitsandbytes_paged),
    "FlashAdamW, gradient release": ("flashoptim", flashoptim_release),
    "AdaLomo": ("lomo-optim", adalomo),
    "torchao AdamW, stochastic rounding": ("torchao", torchao_stochastic),
    "GaLore AdamW 8 bit, layer-wise": ("galore-torch", galore_layerwise),
}


STEPS = {"1B": (16, 48), "8B": (16, 24), "SmolLM2": (64, 64)}  # before timing, timed; at 1B as gpu.py's without graphs


def hugging_face_batch(sequences):
    """What a causal LM of transformers takes: int64 [rows, length] ids, mask, and labels that are not shifted."""
    length = -(-max(len(s.ids) for s in sequences) // 8) * 8
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, s in enumerate(sequences):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        mask[row, : len(s.ids)] = 1
        labels[row, len(s.ids) - s.targets : len(s.ids)] = torch.tensor(s.ids[-s.targets :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def worker(peer, shape, args, data, queue):
    """Run one peer in this process; put its result on the queue."""
    try:
        queue.put(measure(peer, shape, args, data))
    except Exception as error:  # any library's any error: it is the result
        queue.put({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def measure(peer, shape, args, data):
    train, (before, timed) = data.train, STEPS[shape]
    order = data.training_order(1)[: before + timed]
    batches = [hugging_face_batch([train[row] for row in rows]) for rows in order]
    if shape == "SmolLM2":
        model = weights.load(args.tokenizer, torch.bfloat16)
    else:
        with tempfile.TemporaryDirectory() as folder:
            gpu.make_folder(shape, args.tokenizer, Path(folder))
            model = gpu.random_model(folder, torch.bfloat16)
    model.cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trained = models.choose_trained(model, "layers")
    model.train()
    steps, stamps, peak = itertools.count(1), {}, 0.0

    def after_step():
        nonlocal peak
        step = next(steps)
        if step in (1, before, before + timed):
            torch.cuda.synchronize()
            stamps[step] = time.perf_counter()
        if not before < step < before + timed:
            peak = max(peak, gpu.device_gib())

    began = time.perf_counter()
    PEERS[peer][1](model, batches, after_step)
    seconds, tokens = (
        stamps[before + timed] - stamps[before],
        sum(len(train[row].ids) for row in sum(order[before:], [])),
    )
    result = {
        "device_gib": peak,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "rows_per_second": 8 * timed / seconds,
        "tokens_per_second": tokens / seconds,
        "first_step_seconds": stamps[1] - began,
        "machine": gpu.machine(),
    }
    if shape == "SmolLM2":
        lm = models.CausalLM(model, heads.Head(model), trained, torch.no_grad)
        result |= evaluation.evaluate(lm, data, torch.device("cuda")).values
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True, help="JSON; results that it already holds are replaced, others kept")
    parser.add_argument("--commit", default=gpu.commit())
    parser.add_argument("--shapes", nargs="+", default=["1B", "8B", "SmolLM2"])
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--timeout", type=float, default=90, help="seconds a peer may take")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    where = SimpleNamespace(dataset=args.dataset, train_rows=None, eval_rows=200, epochs=1, train_text="harness")
    where.batch_size, where.max_steps, where.warmup_steps, where.seed = 8, None, 0, 42
    data = common.load_hellaswag(where, tokenizer, 2048)
    processes = multiprocessing.get_context("fork")  # imports are done, CUDA is not started: a context of its own each
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.exists() else {"peers": []}
    for shape in args.shapes:
        for peer in args.only:
            package = PEERS[peer][0]
            result = {"peer": peer, "shape": shape, "commit": args.commit}
            result |= {"torch": torch.__version__, "transformers": transformers.__version__}
            try:
                result["package"] = f"{package} {version(package)}"
                queue = processes.Queue()
                process = processes.Process(target=worker, args=(peer, shape, args, data, queue))
                process.start()
                try:
                    result |= queue.get(timeout=args.timeout)
                except Exception:
                    result["failed"] = f"no result within {args.timeout:.0f} s"
                process.kill()
                process.join()
            except PackageNotFoundError:
                result["failed"] = f"missing: {package} is not installed"
            found["peers"] = [p for p in found["peers"] if (p["peer"], p["shape"]) != (peer, shape)] + [result]
            out.write_text(json.dumps(found, indent=1))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)


if __name__ == "__main__":
    main()
