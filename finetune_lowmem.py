"""Fine-tune all the weights of a causal LM, on HellaSwag or own rows, in little more memory than its bf16 weights.

    python finetune_lowmem.py --run-name X               # Llama-3.2-1B on one GPU
    python finetune_lowmem.py --run-name X --dataset chats.jsonl  # on conversations of your own
    python finetune_lowmem.py --run-name demo --demo     # SmolLM2-135M on a CPU, no account needed
    torchrun --nproc-per-node 2 finetune_lowmem.py --run-name X2  # on two GPUs, each with half of the weights

The five techniques, each marked with its number below:
  1. bf16 weights            2 bytes a parameter, kept unbiased by stochastic rounding   lowmem/adafactor.py
  2. linear cross entropy    no logits array: only target positions meet the head        lowmem/linear_cross_entropy.py
  3. update in backward      a gradient lives until its own update, not the step's end   update_in_backward
  4. gradient checkpointing  the activations of one layer at a time                      main
  5. small batches           8 rows; Adafactor's state is a row and a column a matrix    parse
A model larger than the card: lowmem/placement.py, streaming.py. Several GPUs: sharding.py, training/fsdp.py. What keeps
a GPU busy: cuda_graphs.py.
"""

from contextlib import nullcontext
from functools import partial

import torch

import common
from lowmem import checks, cuda_graphs, placement
from lowmem.adafactor import Adafactor
from lowmem.linear_cross_entropy import cut_cross_entropy, linear_cross_entropy, require_cut
from lowmem.training import arguments, command, evaluation, models, parallel, tokenizing
from lowmem.training import run as runs

CROSS_ENTROPY = {"fp32": linear_cross_entropy, "cut": cut_cross_entropy}


def parse(argv):
    parser = arguments.parser("finetune_lowmem", __doc__, batch_size=8, lr=1e-4, demo_lr=6e-4, log_every=400)  # 5
    parser.add("--cross_entropy", choices=list(CROSS_ENTROPY), default="fp32",
               help="fp32: ours; cut: cut-cross-entropy's, on a GPU, for comparison")  # fmt: skip
    parser.add("--nostround", action="store_true", help="round to nearest instead of stochastically: the ablation")
    parser.add("--no_compile", action="store_true", help="run the model as it is: no torch.compile, no CUDA graphs")
    parser.add("--memory_budget", type=arguments.above_zero, metavar="GIB",
               help="memory of the GPU that may be in use in all, context and evaluation included; what does not fit "
               "streams from host memory; None: 98 %% of the card")  # fmt: skip
    args = arguments.parse(parser, argv)
    if args.memory_budget:
        placement.require_one_gpu()
    if args.cross_entropy == "cut":
        require_cut()
    return args


def precision():
    """The context of each forward pass: bf16 as it is on a GPU, bf16 with fp32 products on a CPU."""
    return nullcontext() if torch.cuda.is_available() else models.Fp32Products()


def training_loss(lm, batch, cross_entropy=linear_cross_entropy):
    """Mean cross entropy over the batch's target tokens, this rank's part, from the hidden states that predict them."""
    return cross_entropy(lm.head, lm.hidden_states(batch), batch.targets, batch.weights)  # 2


def update_in_backward(optimizer, trained, when_updated=lambda p: None):  # 3
    """Update each parameter as soon as backward has its whole gradient, and release that gradient at once.

    The hook runs once per backward pass and parameter, after all uses of a tied weight were summed. Returns handles.
    """

    def update(p):
        optimizer.update(p)
        p.grad = None
        when_updated(p)  # a streamed one goes back to host memory

    return [p.register_post_accumulate_grad_hook(update) for p in trained.values()]


def main(argv=None):
    args = parse(argv)
    rounding = "nearest" if args.nostround else "stochastic"
    method = f"Adafactor in backward, bf16 weights, {rounding} rounding, {args.cross_entropy} cross entropy"
    device = command.set_up(args, method)
    cuda_graphs.prepare_process(device)
    cross_entropy = CROSS_ENTROPY[args.cross_entropy]
    loss_of = partial(training_loss, cross_entropy=cross_entropy)

    # Data
    tokenizer, max_tokens = tokenizing.load(args.model, weights=not args.dry_run)
    data = common.load(args, tokenizer, max_tokens)
    if args.dry_run:
        common.say_examples(data, tokenizer)
    graphs, compiled = cuda_graphs.choose_kernels(args, data, device)

    # Model: weights in bf16 (1), on the GPU as far as they fit, each layer's activations made again in backward (4)
    budget = placement.budget_bytes(args.memory_budget, device)
    placement.require_room(args.model, budget)
    lm = models.load(args.model, torch.bfloat16, args.trained, precision, stand_in=args.dry_run)
    models.check_ids(lm, data)
    lm.head_stays = args.cross_entropy == "cut"
    cuda_graphs.leave_out_masks(lm.network, data.longest())
    measure = partial(placement.measure_one_step, training_loss=loss_of, update_in_backward=update_in_backward)
    if args.dry_run:
        return placement.make_plan(lm, data, device, budget, graphs, measure)
    common.say_special_tokens(args, lm, data, tokenizer)
    plan = placement.make_plan(lm, data, device, budget, graphs, measure)
    placed = placement.place(lm, data, device, plan)
    lm.check(data, cross_entropy)
    uses_rng = lm.uses_rng_in_forward(data.small().to(device))  # then layers must draw the same again in backward
    models.checkpoint_activations(lm.network, context_fn=placed.recomputation, preserve_rng_state=uses_rng)

    # Optimizer: Adafactor with stochastic rounding (1), run inside backward (3)
    optimizer = Adafactor(lm.trained.values(), lr=args.lr, rounding=rounding, seed=args.seed)
    update_in_backward(optimizer, lm.trained, when_updated=placed.send_home)
    checks.techniques_are_active(lm, loss_of, optimizer, data, placed)

    @placed.settled()
    def step(batch):
        loss = loss_of(lm, batch)
        loss.backward()  # updates the weights too
        return parallel.sum_over_ranks(loss.detach())

    score_targets = placed.settled()(lm.score_targets)
    if uses_rng and graphs:
        graphs = cuda_graphs.no_graphs(data)  # each replay would draw the same numbers
    if graphs:
        step, score_targets = cuda_graphs.as_graphs(step, score_targets, lm, optimizer, compiled, data)

    # Train
    evaluate = partial(evaluation.evaluate, lm, data, device, score_targets)
    with runs.Run(args, lm, tokenizer, optimizer, data, evaluate, placed.all_at_home, one_gradient=True) as run:
        for shape in run.expected_shapes() if graphs else ():
            step.reserve(shape)
        run.evaluate(epoch=0)
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                run.after_step(step(batch))
            run.evaluate(epoch)
        return run.finish()


if __name__ == "__main__":
    command.start(main)
