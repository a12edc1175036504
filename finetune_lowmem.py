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

What a GPU also gets, so that CUDA takes little of it and the host never keeps it waiting: `shrink_context`,
`leave_out_masks`, `compile_layers`, `Graphs`.
"""

import ctypes
import os
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common

GRAPHS_PAY = 65  # steps, or 195 evaluation batches: of a 1B model they take 9 s on an H100, and save 0.14 s a step
COMPILING_PAYS = 5000  # steps: on an H100 it takes 22 s at the start, and saves 4.5 ms a step of a 1B model
PAD_TO = 32  # tokens: few lengths, few graphs


def precision():
    """Context of each forward pass: bf16 as it is on a GPU, bf16 with fp32 products on a CPU."""
    return nullcontext() if torch.cuda.is_available() else common.Fp32Products()


# ---------------------------------------------------------------------------------------------------------------------
# The memory techniques


def target_loss(head, hidden, targets, weights):
    """Cross entropy of targets [n] after hidden [n, width], summed with weights [n]; no [n, vocabulary] array exists.

    On a GPU cut-cross-entropy's kernel (Wijmans et al. 2024), which keeps logits on chip; where it cannot run (no GPU,
    or a head with a bias) a piece of the positions at a time, each piece's logits made again in backward.
    """
    if hidden.is_cuda and head.bias is None:
        from cut_cross_entropy.cce import CCEParams, linear_cross_entropy_apply  # needs triton, as only a GPU has

        # Not linear_cross_entropy itself: it looks for ignored targets, and the host would wait for the answer.
        # filter_eps=None: by default small gradients are dropped, and Adafactor scales a rare token's row up to size.
        params = CCEParams(targets, None, head.softcap, "none", filter_eps=None, shift=False, batch_shape=targets.shape)
        return (linear_cross_entropy_apply(hidden * head.scale, head.weight, params) * weights).sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t, w in zip(*head.pieces(hidden, targets, weights), strict=True):
        total = total + checkpoint(
            lambda h, t, w: (F.cross_entropy(head.logits(h), t, reduction="none") * w).sum(),
            h,
            t,
            w,
            use_reentrant=False,
        )
    return total


def training_loss(model, head, batch):
    """Mean cross entropy over the batch's target tokens, from the hidden states that predict them."""
    with precision():
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return target_loss(head, hidden.flatten(0, 1)[batch.positions], batch.targets, batch.weights)


def update_in_backward(optimizer, trained):
    """Update each parameter as soon as backward has its whole gradient, and release that gradient at once.

    The hook runs once per backward pass and parameter, after all uses of a tied weight were summed. Returns handles.
    """

    def update(p):
        optimizer.update(p)
        p.grad = None

    return [p.register_post_accumulate_grad_hook(update) for p in trained.values()]


def keep_on_host(model, device):
    """Move the model to `device`, but let a GPU read untied, untrained input embeddings from host memory, row by row.

    They go to the GPU where looking up is more than copying rows (Gemma scales them). Returns whether they stay.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    on_host = (
        device.type == "cuda"
        and not embeddings.weight.requires_grad
        and embeddings.weight is not head.weight
        and type(embeddings) is torch.nn.Embedding
    )
    for module in [m for m in model.modules() if not (on_host and m is embeddings)]:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
    if on_host:
        embeddings.weight.data = embeddings.weight.data.cpu().pin_memory()
        embeddings.forward = lambda ids: common.rows_from_host(embeddings.weight, ids)
    return on_host


def shrink_context():
    """Make CUDA take less of the GPU for itself: on an H100 0.55 GiB instead of 0.76, graphs included."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:1")  # 4 MiB instead of 32, twice for each thread and stream
    torch.autograd.set_multithreading_enabled(False)  # backward on this thread, with its workspace
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default stream: one other for all
    # Local memory is set aside for all threads that the GPU can hold, 2,048 x 132 on an H100, at 1,024 bytes each. CUDA
    # enlarges it by itself for a kernel that needs more than these 256.
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(0, ctypes.c_size_t(256))  # 0: CU_LIMIT_STACK_SIZE


# ---------------------------------------------------------------------------------------------------------------------
# What keeps the GPU busy


def leave_out_masks(model, longest):
    """Let attention know by itself that it is causal: with the padding on the right no mask is needed.

    transformers makes a mask in each forward pass, and for it looks at the positions on the host: the GPU would wait. A
    model with a window of fewer than `longest` tokens gets them all, in one layout: transformers would leave out some
    and expand others, but not while a graph is captured, which would then need code that `warm_up` has not compiled.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation == "sdpa":
        name = "sdpa_without_mask" if all(w is None or w >= longest for w in windows) else "sdpa_with_mask"
        AttentionInterface.register(name, sdpa_attention_forward)
        if name == "sdpa_with_mask":
            AttentionMaskInterface.register(
                name, lambda **how: sdpa_mask(**how | {"allow_is_causal_skip": False}).contiguous()
            )
        model.set_attn_implementation(name)


def compile_layers(model, backend="inductor"):
    """Compile what lies between the matrix products of each decoder layer: norms, rotations, activation functions.

    The products stay out, so that each weight's gradient comes, is used and is released by itself. A layer compiled as
    a whole hands over all of its gradients together, 0.4 GiB in an 8B model.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(common.cache_folder() / "compiled"))  # survives a reboot
    for layer in common.decoder_layers(model):
        for module in layer.modules():
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                module.forward = torch.compiler.disable(module.forward)
        layer.compile(dynamic=True, backend=backend)


class Graphs:
    """`function(batch)` -> tensor, replayed as CUDA graphs: one launch instead of thousands.

    One graph for each shape of ids, captured when its first batch comes; by then what `function` needs must be compiled
    and loaded (`warm_up`). A batch of fewer than `rows` rows is filled up. The list of targets is padded to a multiple
    of 128, and a graph captured anew when a batch has more of them. All graphs share `pool`: one runs after the other,
    so that together they need no more memory than the largest.
    """

    def __init__(self, function, pool, rows=0):
        self.function, self.pool, self.rows, self.graphs = function, pool, rows, {}

    def __call__(self, batch):
        count, (rows, length) = len(batch.targets), batch.ids.shape
        shape = max(rows, self.rows), length
        if shape not in self.graphs or len(self.graphs[shape][1].targets) < count:
            self.graphs.pop(shape, None)  # its memory first
            self.graphs[shape] = self._capture(common.pad_batch(batch, self.rows, -(-count // 128) * 128))
        graph, inputs, result = self.graphs[shape]
        batch = common.pad_batch(batch, self.rows, len(inputs.targets))
        for name in ("ids", "positions", "targets", "weights"):
            getattr(inputs, name).copy_(getattr(batch, name))
        graph.replay()
        return result[:count].clone() if result.ndim else result.clone()  # the next graph overwrites the pool

    def _capture(self, inputs):
        graph = torch.cuda.CUDAGraph()
        with advise_no_compile(), torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
            return graph, inputs, self.function(inputs)


@contextmanager
def advise_no_compile():
    """Turn what compiling and capturing raise, in many libraries, into a UserError that says how to do without."""
    try:
        yield
    except (torch.OutOfMemoryError, common.UserError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "out of memory" in reason[0]:
            raise torch.OutOfMemoryError(reason[0]) from error
        raise common.UserError(
            f"a step of this model cannot be compiled or captured as a CUDA graph ({reason[0]}): run it with "
            "--no_compile (after a first checkpoint, with --resume --no_compile)"
        ) from error


@contextmanager
def learning_rate_zero(optimizer):
    """Steps in this context move nothing; at its end learning rates and state are as at the start of training."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.reset()


def warm_up(step, optimizer, rows, lengths, device):
    """Compile and load what steps on batches [rows, length] need, by one of each at learning rate 0, the longest first.

    So a GPU that is too small for the longest batch says so here, before anything was trained.
    """
    with learning_rate_zero(optimizer), advise_no_compile():
        for length in sorted(lengths, reverse=True):
            ids = torch.zeros(rows, length, dtype=torch.int64)
            labels = torch.full_like(ids, common.IGNORE)
            labels[:, -1] = 0
            batch = common.Batch.of(ids, labels, tokens=ids.numel())
            # more than 128 targets, as most batches have: for fewer cut-cross-entropy has other kernels
            step(common.pad_batch(batch, rows, max(256, -(-rows // 128) * 128)).to(device))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def rounds_stochastically(optimizer, device):
    """Whether the optimizer's update really rounds up and down: a step of 0.026 ulp moves some 105 of 4,096 weights."""
    weights = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    weights.grad = torch.ones_like(weights)
    group = optimizer.param_groups[0]
    common.Adafactor([weights], 1e-4, group["beta2"], group["rounding"], fused=optimizer.fused).step()
    return 0 < (weights != 1).sum().item() < 500


def check_techniques(model, head, trained, optimizer, batch, on_host):
    """Refuse to train unless each technique is really active, by one step at learning rate 0; leaves all as it was.

    on_host: whether the input embeddings are to be in host memory.
    """
    problems, fired, forwards = [], dict.fromkeys(trained, 0), []

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
    with learning_rate_zero(optimizer):
        loss = training_loss(model, head, batch)
        loss.backward()
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
    if loss.is_cuda and head.bias is None and "LinearCrossEntropy" not in _names_in_graph(loss):
        problems.append("cut-cross-entropy is off")
    if on_host and model.get_input_embeddings().weight.is_cuda:
        problems.append("untrained embeddings are on the GPU")
    if problems:
        raise common.UserError(f"{type(model).__name__} cannot be trained in low memory: {problems[0]}")


def _names_in_graph(loss):
    """Names of the autograd nodes of the loss and of the two steps before it."""
    nodes, names = [loss.grad_fn], []
    for _ in range(3):
        names += [node.name() for node in nodes]
        nodes = [parent for node in nodes for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = common.argument_parser(__doc__.splitlines()[0], batch_size=8, lr=1e-4, demo_lr=3e-4, log_every=400)
    parser.add("--nostround", action="store_true", help="round to nearest instead of stochastically: the ablation")
    parser.add("--no_compile", action="store_true", help="run the model as it is: no torch.compile, no CUDA graphs")
    args = common.parse_arguments(parser, argv)
    device = common.set_up(args)
    on_gpu = device.type == "cuda"
    if on_gpu:
        shrink_context()
    memory = common.Memory(device)

    # Data and model, the weights in bf16
    tokenizer, limit = common.load_tokenizer(args.model)
    data = common.load_data(args, tokenizer, limit)
    model = common.load_model(args.model, torch.bfloat16)
    trained = common.choose_trained(model, args.trained)
    head = common.Head(model)
    on_host = keep_on_host(model, device)
    leave_out_masks(model, longest=common.longest_sequence(data))
    batch = common.small_batch(data, limit).to(device)
    losses = {
        "evaluation": head.mean_nll,
        "linear cross entropy": lambda hidden, targets: target_loss(head, hidden, targets, batch.weights),
    }
    common.check_causal(model, data, batch, precision)
    common.check_head(model, head, batch, precision, losses)

    # Gradient checkpointing; layers run again in backward in the same precision
    random = common.draws_random_numbers(model, batch, precision)  # then layers must draw the same again in backward
    common.checkpoint_activations(model, context_fn=lambda: (nullcontext(), precision()), preserve_rng_state=random)

    # Adafactor with stochastic rounding, run inside backward
    optimizer = common.Adafactor(
        trained.values(), lr=args.lr, rounding="nearest" if args.nostround else "stochastic", seed=args.seed
    )
    update_in_backward(optimizer, trained)
    check_techniques(model, head, trained, optimizer, batch, on_host)
    gradients = ("largest gradient", max(common.size_in_bytes([p]) for p in trained.values()))

    def step(batch):
        loss = training_loss(model, head, batch)
        loss.backward()  # updates the weights too
        return loss.detach()

    def log_probs_of(batch):
        return common.target_log_probs(model, head, batch, precision)

    # On a GPU, compiled and as CUDA graphs
    steps, evaluations = common.planned_work(args, data)
    graphs = on_gpu and not args.no_compile and not random and steps + evaluations / 3 >= GRAPHS_PAY
    if on_gpu and random:
        print("the model draws random numbers (dropout): no CUDA graphs")
    elif on_gpu and not graphs and not args.no_compile:
        print(f"{steps} steps and {evaluations} evaluation batches are too few for CUDA graphs to pay: as --no_compile")
    if graphs:
        if steps >= COMPILING_PAYS:
            compile_layers(model)
            log_probs_of = torch.compiler.set_stance("force_eager")(log_probs_of)  # not worth a second compilation
        print(
            f"{steps} steps as CUDA graphs, decoder layers {'compiled' if steps >= COMPILING_PAYS else 'not compiled'}"
        )
        warm_up(step, optimizer, args.batch_size, common.padded_lengths(data[0], PAD_TO, limit), device)
        pool = torch.cuda.graph_pool_handle()
        step, log_probs_of = Graphs(step, pool, rows=args.batch_size), Graphs(log_probs_of, pool)

    # Train
    run = common.Run(
        args,
        "finetune_lowmem",
        model=model,
        tokenizer=tokenizer,
        trained=trained,
        optimizer=optimizer,
        gradients=gradients,
        data=data,
        limit=limit,
        log_probs_of=log_probs_of,
        memory=memory,
        pad_to=PAD_TO if graphs else 8,
    )
    run.evaluate(epoch=0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            loss = step(batch)
            run.after_step(loss, batch)
        run.evaluate(epoch)
    return run.finish()


if __name__ == "__main__":
    common.run_command(main)
