"""What a run would take whose weights, gradients and optimizer state all stay on the GPU."""

from collections.abc import Callable, Iterable

import torch

from lowmem.training import attention, memory, models, records
from lowmem.training.data import Data
from lowmem.training.errors import UserError, refuse_what_fails
from lowmem.training.models import CausalLM


def say_peak(
    lm: CausalLM,
    data: Data,
    device: torch.device,
    training_loss: Callable,
    make_optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
) -> None:
    """Print the GPU's predicted peak; raise UserError if it does not fit. Without a GPU print what the weights take.

    lm: on the host, of the dtype that it is trained in; of its layers the first have weights (`models.load`).
    """
    if device.type != "cuda":
        size = memory.size_in_bytes(lm.network.parameters())
        records.say("weights", f"{size / memory.GIB:.2f} GiB in fp32; what a step takes is measured on a GPU alone")
        return
    peak, card = predicted_peak(lm, data, device, training_loss, make_optimizer), torch.cuda.mem_get_info()[1]
    records.say("GPU memory", f"predicted peak {peak / memory.GIB:.2f} GiB of {card / memory.GIB:.2f}")
    if peak > card:
        raise UserError(
            f"{peak / memory.GIB:.2f} GiB of GPU memory would be needed, and there are {card / memory.GIB:.2f}: take a "
            "smaller --batch_size or --max_length, or finetune_lowmem.py"
        )


def predicted_peak(lm, data, device, training_loss, make_optimizer) -> int:
    """Bytes of the GPU in use at the peak: two steps of the largest batch with the first layers only are measured, or
    evaluations where nothing is trained, and what the others hold is added.
    """
    count = models.layers_to_measure(lm.network)
    with models.first_layers(lm.network, count), refuse_what_fails(lm.network):
        lm.network.to(device)
        attention.choose_layout(lm, data)
        models.checkpoint_activations(lm.network)
        few = [p for p in lm.trained.values() if p.is_cuda]
        optimizer = make_optimizer(few)
        batch = data.largest(data.training_shapes() or data.evaluation_shapes()).to(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first time kernels are loaded too
            if not data.train:
                with torch.no_grad():
                    lm.score_targets(batch)
                continue
            training_loss(lm, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        free, total = torch.cuda.mem_get_info()
        peak = total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
        state = [x for values in optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
        copies = 2 if data.train else 1  # weights and gradients
        held = (memory.size_in_bytes(state) + copies * memory.size_in_bytes(few)) / sum(p.numel() for p in few)
    others = list(lm.layers)[count:]
    peak += held * sum(p.numel() for layer in others for p in layer.parameters())
    if data.train:  # checkpointing keeps each layer's input
        width = lm.network.config.get_text_config().hidden_size * next(iter(few)).itemsize
        peak += len(others) * batch.ids.numel() * width
    return int(peak)
