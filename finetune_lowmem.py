"""Fine-tune all the weights of a causal LM on HellaSwag in little more memory than its bf16 weights.

    python finetune_lowmem.py --run-name X               # Llama-3.2-1B on one GPU
    python finetune_lowmem.py --run-name demo --demo     # SmolLM2-135M on a CPU, no account needed

The five techniques, in the order of this file:
  1. linear cross entropy    no logits array: only target positions reach the head          `target_loss`
  2. update in backward      a gradient lives until its own update, not the step's end      `update_in_backward`
  3. bf16 weights            2 bytes a parameter, kept unbiased by stochastic rounding      `common.Adafactor`
  4. gradient checkpointing  the activations of one layer at a time                         `main`
  5. small batches           8 rows; Adafactor's state is a row and a column per matrix     `main`
Embeddings that are neither trained nor tied to the head stay in host memory (`keep_on_host`).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common


def precision():
    """Context of each forward pass: bf16 as it is on a GPU, bf16 with fp32 products on a CPU."""
    return nullcontext() if torch.cuda.is_available() else common.Fp32Products()


def target_loss(head, hidden, targets):
    """Mean cross entropy of targets [n] after hidden [n, width], without an [n, vocabulary] array in memory.

    On a GPU cut-cross-entropy's kernel (Wijmans et al. 2024), which keeps logits on chip; where it cannot run (no GPU,
    or a head with a bias) a piece of the positions at a time, each piece's logits made again in backward.
    """
    if hidden.is_cuda and head.bias is None:
        from cut_cross_entropy import linear_cross_entropy  # needs triton, which only a GPU's machine must have

        # filter_eps=None: by default small gradients are dropped, and Adafactor scales a rare token's row up to size
        return linear_cross_entropy(hidden * head.scale, head.weight, targets, softcap=head.softcap, filter_eps=None)
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in head.pieces(hidden, targets):
        total = total + checkpoint(
            lambda h, t: F.cross_entropy(head.logits(h), t, reduction="sum"), h, t, use_reentrant=False
        )
    return total / len(targets)


def training_loss(model, head, batch):
    """Mean cross entropy over the batch's target tokens, from the hidden states that predict them."""
    with precision():
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    positions = (batch.labels != common.IGNORE).nonzero(as_tuple=True)
    return target_loss(head, hidden[positions], batch.labels[positions])


def update_in_backward(optimizer, trained):
    """Update each parameter as soon as backward has its whole gradient, and release that gradient at once.

    The hook runs once per backward pass and parameter, after all uses of a tied weight were summed. Returns handles.
    """

    def update(p):
        optimizer.update(p)
        p.grad = None

    return [p.register_post_accumulate_grad_hook(update) for p in trained.values()]


def keep_on_host(model, device):
    """Move the model to `device` but for untied, untrained input embeddings, which look rows up in host memory."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    on_host = not embeddings.weight.requires_grad and embeddings.weight is not head.weight
    for module in [m for m in model.modules() if not (on_host and m is embeddings)]:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
    if on_host:
        embeddings.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.device),))
        embeddings.register_forward_hook(lambda module, args, output: output.to(device))


def rounds_stochastically(optimizer, device):
    """Whether the optimizer's update really rounds up and down: a step of 0.026 ulp moves some 105 of 4,096 weights."""
    weights, (row, col) = torch.ones(64, 64, dtype=torch.bfloat16, device=device), torch.zeros(2, 64, device=device)
    group = optimizer.param_groups[0]
    common.adafactor_update(weights, torch.ones_like(weights), row, col, 1e-4, group["beta2"], group["rounding"])
    return 0 < (weights != 1).sum().item() < 500


def check_techniques(model, head, trained, optimizer, batch):
    """Refuse to train unless each technique is really active, by one step at learning rate 0; leaves all as it was."""
    problems, fired, forwards = [], dict.fromkeys(trained, 0), []
    embeddings = model.get_input_embeddings().weight

    def after_update(name, p):
        fired[name] += 1
        if p.grad is not None:
            problems.append(f"the gradient of {name} outlives its update")

    handles = [
        decoder_layer.register_forward_pre_hook(lambda *_: forwards.append(1))
        for decoder_layer in common.decoder_layers(model)[:1]
    ]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p, name=name: after_update(name, p)) for name, p in trained.items()
    ]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss = training_loss(model, head, batch)
    loss.backward()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.reset()
    for handle in handles:
        handle.remove()

    if rounds_stochastically(optimizer, loss.device) != (optimizer.param_groups[0]["rounding"] == "stochastic"):
        problems.append("stochastic rounding is off, or on in spite of --nostround")
    if len(forwards) != 2:
        problems.append(f"gradient checkpointing is off: a layer ran {len(forwards)} times instead of twice")
    if wrong := [name for name, count in fired.items() if count != 1]:
        problems.append(f"{wrong[0]} was updated {fired[wrong[0]]} times in one step instead of once")
    if wrong := [name for name, p in trained.items() if p.dtype != torch.bfloat16]:
        problems.append(f"{wrong[0]} is {trained[wrong[0]].dtype} instead of bf16")
    if wrong := [name for name, p in model.named_parameters() if p.grad is not None]:
        problems.append(f"{wrong[0]} keeps a gradient")
    if loss.is_cuda and head.bias is None and "LinearCrossEntropy" not in loss.grad_fn.name():
        problems.append("cut-cross-entropy is off")
    if loss.is_cuda and embeddings is not head.weight and not embeddings.requires_grad and embeddings.is_cuda:
        problems.append("untrained embeddings are on the GPU")
    if problems:
        raise common.UserError(f"{type(model).__name__} cannot be trained in low memory: {problems[0]}")


def main(argv=None):
    parser = common.argument_parser(__doc__.splitlines()[0], batch_size=8, lr=1e-4, demo_lr=3e-4, log_every=400)
    parser.add("--nostround", action="store_true", help="round to nearest instead of stochastically: the ablation")
    args = common.parse_arguments(parser, argv)
    device = common.set_up(args)
    memory = common.Memory(device)

    # Data and model, the weights in bf16
    tokenizer, limit = common.load_tokenizer(args.model)
    data = common.load_data(args, tokenizer, limit)
    model = common.load_model(args.model, torch.bfloat16)
    trained = common.choose_trained(model, args.trained)
    head = common.Head(model)
    keep_on_host(model, device)
    batch = common.small_batch(data, limit).to(device)
    losses = {
        "evaluation": head.mean_nll,
        "linear cross entropy": lambda hidden, targets: target_loss(head, hidden, targets),
    }
    common.check_causal(model, data, batch, precision)
    common.check_head(model, head, batch, precision, losses)

    # Gradient checkpointing; layers run again in backward in the same precision
    common.checkpoint_activations(model, context_fn=lambda: (nullcontext(), precision()))

    # Adafactor with stochastic rounding, run inside backward
    optimizer = common.Adafactor(
        trained.values(), lr=args.lr, rounding="nearest" if args.nostround else "stochastic", seed=args.seed
    )
    update_in_backward(optimizer, trained)
    check_techniques(model, head, trained, optimizer, batch)
    gradients = ("largest gradient", max(common.size_in_bytes([p]) for p in trained.values()))

    # Train
    run = common.Run(
        args,
        "finetune_lowmem",
        model=model,
        head=head,
        tokenizer=tokenizer,
        trained=trained,
        optimizer=optimizer,
        gradients=gradients,
        data=data,
        limit=limit,
        precision=precision,
        memory=memory,
    )
    run.evaluate(epoch=0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            loss = training_loss(model, head, batch)
            loss.backward()  # updates the weights too
            run.after_step(loss, batch)
        run.evaluate(epoch)
    return run.finish()


if __name__ == "__main__":
    common.run_command(main)
