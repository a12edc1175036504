"""The evaluation of held-out sequences, with the weights as they are."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from lowmem.training import models, parallel
from lowmem.training.batches import Batch
from lowmem.training.data import Data, Scores
from lowmem.training.models import CausalLM


@torch.no_grad()
def evaluate(
    lm: CausalLM, data: Data, device: torch.device, score_targets: Callable[[Batch], torch.Tensor] | None = None
) -> Scores:
    """The scores of the held-out sequences: of each the sum of its targets' fp32 log-probabilities, and how many are
    predicted right.

    score_targets: function(batch on `device`) -> as `lm.score_targets`, which is used if None is given. No [rows,
    tokens, vocabulary] array exists. The sequences of a batch are dealt out, and each is scored by one rank.
    """
    score_targets, done = score_targets or lm.score_targets, []
    bar = tqdm(total=len(data.scored), desc="evaluating", unit="sequence", mininterval=0.5)
    with bar, models.mode(lm.network, training=False):
        for chosen in data.evaluation_order():
            batch = data.batch([data.scored[at] for at in chosen])
            own = parallel.deal_to_ranks(chosen)[parallel.rank()]
            done.append((own, score_targets(batch.to(device))))
            bar.update(len(chosen))
        found = data.score(*_sums(data, done))
        bar.set_postfix_str(data.in_words(found.values))
    return found


def _sums(data, done):
    """(fp64 [n] log-probability, int64 [n] targets predicted right) of each scored sequence, of all ranks'."""
    sums = torch.zeros(len(data.scored), 2, dtype=torch.float64)
    for own, scores in done:  # only now, so that the device never waits for the host
        counts = [data.scored[at].targets for at in own]
        for at, of_sequence in zip(own, scores.cpu()[: sum(counts)].split(counts), strict=True):
            sums[at] = of_sequence.double().sum(0)
    sums = parallel.sum_over_ranks(sums)
    return sums[:, 0], sums[:, 1].long()
