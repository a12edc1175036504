"""Trained weights dealt out to several GPUs, by PyTorch's FSDP2."""

import torch

from lowmem.training import models, parallel


def shard(lm: models.CausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Shard what `lm` trains over all ranks, as `dtype`; one rank: leave it as it is.

    FSDP2 (torch's fully_shard; Zhao et al. 2023) gathers a part of the model when it is needed, and hands over the sum
    of all ranks' gradients, each rank its own rows (dimension 0) of each tensor. Parts are each module that holds more
    than an eighth of a decoder layer, what is left of a layer, and what is trained beside the layers. A rank reads only
    its own rows of the model's files, which are mapped, not read, so far.
    """
    if parallel.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, trained = lm.network, lm.trained
    stand_in = {p: torch.nn.Parameter(torch.empty(p.shape, device="meta", dtype=dtype)) for p in trained.values()}
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p in stand_in:
                setattr(module, name, stand_in[p])
    options = {
        "mesh": init_device_mesh(device.type, (parallel.world_size(),)),
        "ignored_params": {p for p in network.parameters() if not p.requires_grad},
    }
    parts = {layer: [] for layer in lm.layers}
    for layer, its_parts in parts.items():
        most = sum(p.numel() for p in layer.parameters())
        for module in list(layer.modules()):
            if module is not layer and 8 * sum(p.numel() for p in module.parameters(recurse=False)) > most:
                its_parts.append(fully_shard(module, **options))
        fully_shard(layer, **options)
    _gather_ahead(parts)
    # Its root is what `hidden_states` calls. Gathered before the layers run, it stays so for the loss: so the head is
    # made a part of it while it is sharded, under a name, since FSDP2 looks for parameters by name
    network.base_model.add_module("head_of_all", network.get_output_embeddings())
    fully_shard(network.base_model, **options)
    del network.base_model.head_of_all
    for module in parallel.sharded_modules(network):  # sums, no means: each target's weight is 1 / the number of all
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    lm.trained = {name: p for name, p in network.named_parameters() if name in trained}
    for name, p in lm.trained.items():
        parallel.own_rows(p).copy_(trained[name].detach()[parallel.rows_of_rank(len(trained[name]))])


def _gather_ahead(parts):
    """Gather the parts {layer: [module]} in the order in which backward, with gradient checkpointing, needs them.

    A layer's last part comes first, then what is left of the layer and the other parts, for the layer to run again.
    FSDP2's own order is that of forward, reversed, one part ahead: on two H200s a step of 8B takes 0.5 ms a layer more.
    """
    behind = None  # the first part of the layer whose backward ran before
    for layer, its_parts in reversed(parts.items()):
        if its_parts:
            if behind:
                behind.set_modules_to_backward_prefetch([its_parts[-1], layer])
            its_parts[-1].set_modules_to_backward_prefetch(its_parts[:-1])
        behind = its_parts[0] if its_parts else None
