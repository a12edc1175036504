"""The baseline: fine-tune a causal LM on HellaSwag with FP32 weights and an ordinary loop.

    python finetune_base.py --run-name X                  # Llama-3.2-1B, FP32 Adam: about 29 GB of GPU memory
    python finetune_base.py --run-name demo-base --demo   # SmolLM2-135M on a CPU, no account needed
    torchrun --nproc-per-node 2 finetune_base.py --run-name X2  # the same on two GPUs

Weights, gradients and Adam's two states are fp32: 16 bytes a parameter. On a GPU the forward pass runs under bf16
autocast; gradients are checkpointed. `diff finetune_base.py finetune_lowmem.py` shows the memory techniques.
"""

import torch
import torch.nn.functional as F

import common

OPTIMIZERS = {
    "Adam": common.guarded(torch.optim.Adam),
    "Adafactor": common.Adafactor,
    "SGD": common.guarded(torch.optim.SGD),
}


def precision():
    """Context of each forward pass: bf16 autocast on a GPU, plain fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    # On several GPUs the cache would hold each layer's bf16 weights until forward ends, beyond the gathered ones
    return torch.autocast("cuda", torch.bfloat16, on_gpu, cache_enabled=common.ranks() == 1)


def training_loss(model, batch):
    """Mean cross entropy over the batch's target tokens, from full logits; of several ranks this one's part of it."""
    with precision():
        logits = model(input_ids=batch.ids, use_cache=False).logits
    labels = batch.labels.flatten()
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=common.IGNORE, reduction="sum")
    return nll / batch.target_tokens


def main(argv=None):
    parser = common.argument_parser(
        "finetune_base", __doc__.splitlines()[0], batch_size=32, lr=3e-6, demo_lr=6e-5, log_every=100
    )
    parser.add("--optimizer", choices=list(OPTIMIZERS), default="Adam", help="update rule")
    args = common.parse_arguments(parser, argv)
    common.ending.save_memory += " or finetune_lowmem.py"
    device = common.set_up(args)
    memory = common.Memory(device)

    # Data and model, the weights in FP32
    tokenizer, limit = common.load_tokenizer(args.model)
    data = common.load_data(args, tokenizer, limit)
    if common.ranks() == 1:  # of several, each reads and converts its part
        empty, _ = common.empty_model(args.model, torch.float32)
        common.need_host_memory(common.size_in_bytes(empty.parameters()), f"{args.model} in fp32")
    model = common.load_model(args.model, torch.float32)
    trained = common.choose_trained(model, args.trained)
    trained = common.shard(model, trained, device, torch.float32)
    model.to(device, torch.float32)
    head = common.Head(model)
    batch = common.small_batch(data, limit).to(device)
    common.check_causal(model, data, batch, precision)
    common.check_head(model, head, batch, precision, {"evaluation": head.mean_nll})

    # Gradient checkpointing, as in the reference baseline; no other memory technique
    common.checkpoint_activations(model)

    optimizer = OPTIMIZERS[args.optimizer](trained.values(), lr=args.lr)
    gradients = ("gradients", common.size_in_bytes(map(common.local, trained.values())))

    # Train
    run = common.Run(
        args,
        model=model,
        tokenizer=tokenizer,
        trained=trained,
        optimizer=optimizer,
        gradients=gradients,
        data=data,
        limit=limit,
        log_probs_of=lambda batch: common.target_log_probs(model, head, batch, precision),
        memory=memory,
    )
    run.evaluate(epoch=0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            loss = training_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.after_step(common.sum_over_ranks(loss.detach()), batch)
        run.evaluate(epoch)
    return run.finish()


if __name__ == "__main__":
    common.run_command(main)
