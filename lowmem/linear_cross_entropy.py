"""The loss without an array of logits: only the positions with a target meet the head, a piece of it at a time."""

import importlib.util
import math
import sys

import torch
import torch.nn.functional as F

from lowmem.training.errors import UserError
from lowmem.training.heads import Head


def linear_cross_entropy(
    head: Head,
    hidden: torch.Tensor,  # [n, width]
    targets: torch.Tensor,  # int64 [n]
    weights: torch.Tensor,  # fp32 [n]
) -> torch.Tensor:
    """fp32 scalar: cross entropy of the targets after the hidden states, summed with the weights.

    No [n, vocabulary] array exists.
    """
    return -(LinearCrossEntropy.apply(hidden, targets, head.weight, head.bias, head) * weights).sum()


def cut_cross_entropy(
    head: Head,
    hidden: torch.Tensor,  # [n, width]
    targets: torch.Tensor,  # int64 [n]
    weights: torch.Tensor,  # fp32 [n]
) -> torch.Tensor:
    """`linear_cross_entropy` by the kernels of cut-cross-entropy (Wijmans et al. 2024), for comparison; on a GPU alone.

    They add up the gradient of the hidden states in bf16; docs/accuracy.md says what that costs. Raises UserError for a
    head with a bias.
    """
    if head.bias is not None:
        raise UserError("--cross_entropy cut takes no head with a bias, which this model has: take fp32")
    from cut_cross_entropy.cce import CCEParams, linear_cross_entropy_apply

    # Its public function looks for ignored targets, for which the host waits: no graph could be captured
    params = CCEParams(targets, None, head.softcap, "none", filter_eps=None, shift=False, batch_shape=targets.shape)
    return (linear_cross_entropy_apply(hidden * head.scale, head.weight, params) * weights).sum()


def require_cut() -> None:
    """Raise UserError unless `cut_cross_entropy` can run here."""
    if not torch.cuda.is_available() or sys.platform != "linux":
        raise UserError("--cross_entropy cut runs on Linux with a GPU alone: take fp32")
    if importlib.util.find_spec("cut_cross_entropy") is None:
        raise UserError("--cross_entropy cut needs a package: pip install cut-cross-entropy==25.1.1")


class LinearCrossEntropy(torch.autograd.Function):
    """fp32 [n]: log-probability of targets [n] after hidden [n, width], from a piece of the head's rows at a time.

    Logits are made in pieces and not kept, as in cut-cross-entropy (Wijmans et al. 2024), but all sums over the
    vocabulary are fp32 and in a fixed order. The softmax's running maximum and sum, rescaled from piece to piece
    (Milakov & Gimelshein 2018), carry the gradient by `hidden` with them: weights that stream are needed only once.
    A head that is trained makes its logits again in backward. weight, bias: the head's, for autograd to see.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, head):
        softmaxes = running_softmaxes(head, hidden, targets, ctx.needs_input_grad[0])
        ctx.head, ctx.dtype, saved = head, hidden.dtype, [None]
        if ctx.needs_input_grad[0]:
            saved = [torch.cat([softmax.gradient() for softmax in softmaxes])]
        if ctx.needs_input_grad[2]:
            saved += [hidden, targets, torch.cat([softmax.log_sum_exp() for softmax in softmaxes])]
        ctx.save_for_backward(*saved)
        return torch.cat([softmax.log_probs() for softmax in softmaxes])

    @staticmethod
    def backward(ctx, grad):
        by_hidden, *of_a_trained_head = ctx.saved_tensors
        by_hidden = (grad[:, None] * by_hidden).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        by_head = head_gradients(ctx.head, grad, *of_a_trained_head) if of_a_trained_head else (None, None)
        return by_hidden, None, *by_head, None


def running_softmaxes(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> list["RunningSoftmax"]:
    """Of targets [n] after hidden [n, width], in blocks, what all pieces of the head tell."""
    blocks = head.blocks(hidden * head.scale, targets, rows=head.piece_rows)
    softmaxes = [RunningSoftmax(head, *block, needs_gradient) for block in zip(*blocks, strict=True)]
    for piece in head.weight_pieces():
        for softmax in softmaxes:
            softmax.add(*piece)
    return softmaxes


class RunningSoftmax:
    """What the pieces of a head so far tell of the log-probabilities of targets [n] after hidden states.

    scaled: those states times the head's scale, [n, width].
    """

    def __init__(self, head: Head, scaled: torch.Tensor, targets: torch.Tensor, needs_gradient: bool):
        self.head, self.scaled, self.targets, self.needs_gradient = head, scaled, targets, needs_gradient
        self.max_logit = scaled.new_full((len(targets), 1), -math.inf, dtype=torch.float32)
        self.likeliest = -1  # the first token of equal ones; looked for where there is no gradient
        self.sum_exp, self.target_logit, self.weighted_sum, self.target_direction = 0.0, 0.0, 0.0, 0.0

    def add(self, piece: slice, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take in a piece of the vocabulary, its weight [v, width] and bias [v] or None."""
        logits = self.head.piece_logits(self.scaled, weight, bias)
        at = (self.targets - piece.start).clamp(0, len(weight) - 1)[:, None]
        here = ((self.targets >= piece.start) & (self.targets < piece.stop))[:, None]
        self.target_logit = self.target_logit + here * logits.gather(1, at)
        if self.needs_gradient:
            slope, largest = softcap_slope(self.head, logits), logits.amax(1, keepdim=True)
        else:
            largest, token = logits.max(1, keepdim=True)
            self.likeliest = torch.where(largest > self.max_logit, piece.start + token, self.likeliest)
        new_max = torch.maximum(self.max_logit, largest)
        shrink, e = (self.max_logit - new_max).exp(), logits.sub_(new_max).exp_()
        self.max_logit, self.sum_exp = new_max, self.sum_exp * shrink + e.sum(1, keepdim=True)
        if self.needs_gradient:
            self.weighted_sum = self.weighted_sum * shrink + _product(e if slope is None else e.mul_(slope), weight)
            slope = 1 if slope is None else slope.gather(1, at)
            self.target_direction = self.target_direction + here * slope * weight[at[:, 0]].float()

    def log_sum_exp(self) -> torch.Tensor:
        """fp32 [n]: logarithm of the sum of all exponentials."""
        return (self.max_logit + self.sum_exp.log()).squeeze(1)

    def log_probs(self) -> torch.Tensor:
        """fp32 [n]."""
        return (self.target_logit - self.max_logit - self.sum_exp.log()).squeeze(1)

    def scores(self) -> torch.Tensor:
        """fp32 [n, 2], see `Head.score_targets`."""
        return torch.stack([self.log_probs(), (self.likeliest.squeeze(1) == self.targets).float()], 1)

    def gradient(self) -> torch.Tensor:
        """fp32 [n, width]: of each log-probability by its hidden state."""
        return self.head.scale * (self.target_direction - self.weighted_sum / self.sum_exp)


def head_gradients(
    head: Head,
    grad: torch.Tensor,  # fp32 [n]
    hidden: torch.Tensor,  # [n, width]
    targets: torch.Tensor,  # int64 [n]
    log_sum_exp: torch.Tensor,  # fp32 [n], see `RunningSoftmax`
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients by the head's weight and bias (None without one) of the log-probabilities times grad."""
    by_weight, by_bias = torch.empty_like(head.weight), None if head.bias is None else torch.empty_like(head.bias)
    blocks = head.blocks(hidden * head.scale, targets, log_sum_exp, grad, rows=head.piece_rows)
    for piece, weight, bias in head.weight_pieces():
        vocabulary = torch.arange(piece.start, piece.stop, device=grad.device)
        weight_sum, bias_sum = 0.0, 0.0
        for h, t, log_sum, g in zip(*blocks, strict=True):
            logits = head.piece_logits(h, weight, bias)
            slope = softcap_slope(head, logits)
            by_logits = logits.sub_(log_sum[:, None]).exp_().neg_().add_(t[:, None] == vocabulary).mul_(g[:, None])
            if slope is not None:
                by_logits.mul_(slope)
            weight_sum = weight_sum + _product(by_logits.T, h)
            if bias is not None:
                bias_sum = bias_sum + by_logits.sum(0)
        by_weight[piece] = weight_sum
        if bias is not None:
            by_bias[piece] = bias_sum
    return by_weight, by_bias


def softcap_slope(head: Head, logits: torch.Tensor) -> torch.Tensor | None:
    """Slope of the soft-capping where it gives these logits; None for a head without one."""
    return None if head.softcap is None else 1 - (logits / head.softcap).square()


def _product(x, y):
    """fp32 x [a, b] times y [b, c], by the device's fast way with fp32 sums."""
    if x.is_cuda and y.dtype != torch.float32:
        return torch.mm(x.to(y.dtype), y, out_dtype=torch.float32)
    return x @ y.float()


class HeadInPieces(Head):
    """A head that is not trained, of which a device sees a piece at a time: `weight_pieces`, of a subclass."""

    def __init__(self, network: torch.nn.Module):
        super().__init__(network)
        self.layer.forward = lambda hidden: torch.cat(
            [F.linear(hidden, *piece) for _, *piece in self.weight_pieces()], -1
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [n, vocabulary] logits of hidden [n, width]."""
        scaled = hidden * self.scale
        return torch.cat([self.piece_logits(scaled, *piece) for _, *piece in self.weight_pieces()], -1)

    def score_targets(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 2]: see `Head.score_targets`."""
        return torch.cat([softmax.scores() for softmax in running_softmaxes(self, hidden, targets, False)])
