"""From hidden states to logits, and the proof that they are the model's own."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lowmem.training.batches import Batch
from lowmem.training.errors import UserError

MAX_LOGITS = 2**23  # that exist at once, of fp32: 32 MiB
HEAD_PIECE_BYTES = 2**25  # of a head's weights that are worked on, or on the device, at a time


class Head:
    """What turns the last hidden state into logits: softcap(scale * hidden @ weight.T + bias).

    `scale` covers Granite (1 / logits_scaling) and Cohere (logit_scale), `softcap` Gemma 2 (cap * tanh(x / cap)).
    `check_head` compares it with the model's own logits, so that an architecture which does more is refused.
    """

    def __init__(self, network: torch.nn.Module):
        layer, config = network.get_output_embeddings(), network.config.get_text_config()
        if layer is None or network.base_model is network:
            raise UserError(f"{type(network).__name__} is not supported: its language-model head cannot be found")
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
            value = getattr(config, name, None)
            if not isinstance(value, int | float | None):
                raise UserError(f"the model's config.json is damaged: {name} is {value!r}, not a number")
        self.layer = layer
        self.piece_rows = max(1, HEAD_PIECE_BYTES // (layer.weight.shape[1] * layer.weight.itemsize))
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def weight(self) -> torch.Tensor:
        """[vocabulary, width]."""
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[vocabulary], or None."""
        return getattr(self.layer, "bias", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [n, vocabulary] logits of hidden [n, width]."""
        return self.piece_logits(hidden * self.scale, self.weight, self.bias)

    def piece_logits(self, scaled: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """fp32 [n, v] logits for v rows of the head, their weight [v, width] and bias [v] or None.

        scaled: [n, width], the hidden states times `scale`. Without autograd nothing is rounded to bf16 on the way.
        """
        if not scaled.is_cuda or weight.dtype == torch.float32:
            logits = scaled.float() @ weight.float().T
        elif torch.is_grad_enabled():
            logits = (scaled @ weight.T).float()
        else:
            logits = torch.mm(scaled, weight.T, out_dtype=torch.float32)
        if bias is not None:
            logits = logits + bias.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def weight_pieces(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Yield (slice of the vocabulary, its `piece_rows` rows of the weight, theirs of the bias or None)."""
        for start in range(0, len(self.weight), self.piece_rows):
            piece = slice(start, min(start + self.piece_rows, len(self.weight)))
            yield piece, self.weight[piece], None if self.bias is None else self.bias[piece]

    def blocks(self, *tensors: torch.Tensor, rows: int | None = None) -> list[tuple[torch.Tensor, ...]]:
        """The tensors [n, ...] in blocks of few logits, of `rows` rows of the head if not of all."""
        size = max(1, MAX_LOGITS // (rows or self.weight.shape[0]))
        return [tensor.split(size) for tensor in tensors]

    def score_targets(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 2]: log-probability of targets [n] after hidden [n, width]; 1 for the likeliest token, else 0."""
        scores = []
        for h, t in zip(*self.blocks(hidden, targets), strict=True):
            logits = self.logits(h)
            right = logits.argmax(1) == t  # the largest logit alone would not do: of equal ones each has it
            scores.append(torch.stack([-F.cross_entropy(logits, t, reduction="none"), right.float()], 1))
        return torch.cat(scores)


def check_head(
    network: torch.nn.Module, head: Head, batch: Batch, losses: dict[str, Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    """Refuse an architecture whose own loss differs from ours on one small batch, in evaluation mode.

    Raises UserError. losses: {name: function(hidden [n, width]) -> mean loss of the batch's n targets}. Checked with
    the head's input as it is, and scaled up until the largest logit is near 50, where a soft-capping or scaling that we
    missed cannot hide behind the small logits of an untrained model. Tolerance 0.5 %, or what rounding to bf16 does to
    the loss of a single target: its logit and the largest one are off by up to 1/256 of the largest each.
    """
    name = type(network).__name__
    hidden = network.base_model(**batch.inputs(), use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch.indices]
    for gain in (1.0, 50 / max(head.logits(hidden).abs().max().item(), 1e-6)):
        handle = head.layer.register_forward_pre_hook(lambda module, args, gain=gain: (args[0] * gain,))
        logits = network(**batch.inputs(), use_cache=False).logits.flatten(0, 1)[batch.indices]
        handle.remove()
        own, largest = F.cross_entropy(logits.float(), batch.targets).item(), logits.abs().max().item()
        if not math.isfinite(own):
            raise UserError(f"the model's own loss is {own}: its weights are damaged or too large; get it again")
        for what, loss in losses.items():
            ours = loss(hidden * gain).item()
            if not abs(ours - own) <= max(0.005, 0.005 * own, largest / 128):
                raise UserError(
                    f"{name} is not supported: {what} gives a loss of {ours:.4f} where the model's own is {own:.4f} "
                    f"(head input times {gain:.3g}); its head does more than scale, multiply, add and soft-cap"
                )
