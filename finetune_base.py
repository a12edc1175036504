"""The baseline: fine-tune a causal LM, on HellaSwag or own rows, with FP32 weights and an ordinary loop.

    python finetune_base.py --run-name X                  # Llama-3.2-1B, FP32 Adam: about 20 GiB of GPU memory
    python finetune_base.py --run-name demo-base --demo   # SmolLM2-135M on a CPU, no account needed
    torchrun --nproc-per-node 2 finetune_base.py --run-name X2  # the same on two GPUs

Weights, gradients and Adam's two states are fp32: 16 bytes a parameter. On a GPU the forward pass runs under bf16
autocast. `diff finetune_base.py finetune_lowmem.py` shows the memory techniques.
"""

from functools import partial

import torch
import torch.nn.functional as F

import common
from lowmem.adafactor import Adafactor
from lowmem.training import arguments, attention, command, dry_run, evaluation, fsdp, models, parallel, tokenizing
from lowmem.training import run as runs
from lowmem.training.batches import IGNORE


def parse(argv):
    parser = arguments.parser("finetune_base", __doc__, batch_size=32, lr=3e-6, demo_lr=6e-5, log_every=100)
    parser.add("--optimizer", choices=["Adam", "Adafactor", "SGD"], default="Adam", help="update rule")
    return arguments.parse(parser, argv)


def precision():
    """The context of each forward pass: bf16 autocast on a GPU, plain fp32 on a CPU."""
    # On several GPUs the cache would hold each layer's bf16 weights until forward ends, beyond the gathered ones
    cached = parallel.world_size() == 1
    return torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available(), cache_enabled=cached)


def training_loss(lm, batch):
    """Mean cross entropy over the batch's target tokens, this rank's part, from logits [rows, length, vocabulary]."""
    logits = lm.logits(batch)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return nll / batch.target_tokens


def make_optimizer(name, parameters, lr, fused):
    """The optimizer of --optimizer; torch's own are fused on a GPU."""
    if name == "Adafactor":
        return Adafactor(parameters, lr=lr)
    return {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[name](parameters, lr=lr, fused=fused)


def main(argv=None):
    args = parse(argv)
    device = command.set_up(args, method=f"{args.optimizer}, fp32 weights")

    # Data
    tokenizer, max_tokens = tokenizing.load(args.model, weights=not args.dry_run)
    data = common.load(args, tokenizer, max_tokens)
    if args.dry_run:
        common.say_examples(data, tokenizer)

    # Model: weights in fp32, each layer's activations made again in backward
    models.require_room(args.model, torch.float32)
    lm = models.load(args.model, torch.float32, args.trained, precision, stand_in=args.dry_run)
    models.check_ids(lm, data)
    optimizer_of = partial(make_optimizer, args.optimizer, lr=args.lr, fused=device.type == "cuda")
    if args.dry_run:
        return dry_run.say_peak(lm, data, device, training_loss, optimizer_of)
    common.say_special_tokens(args, lm, data, tokenizer)
    fsdp.shard(lm, device, torch.float32)
    lm.network.to(device, torch.float32)
    attention.choose_layout(lm, data)
    lm.check(data)
    models.checkpoint_activations(lm.network)

    # Optimizer
    optimizer = optimizer_of(lm.trained.values())

    # Train
    evaluate = partial(evaluation.evaluate, lm, data, device)
    with runs.Run(args, lm, tokenizer, optimizer, data, evaluate) as run:
        run.evaluate(epoch=0)
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                loss = training_loss(lm, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                run.after_step(parallel.sum_over_ranks(loss.detach()))
            run.evaluate(epoch)
        return run.finish()


if __name__ == "__main__":
    command.start(main)
