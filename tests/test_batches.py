"""Sequences, and the padded batches that they make. python -m pytest tests/test_batches.py"""

import math
import random
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowmem.training import parallel
from lowmem.training.batches import IGNORE, Data, Sequence, pad_batch

sequence = st.integers(2, 50).flatmap(
    lambda n: st.builds(Sequence, st.lists(st.integers(0, 399), min_size=n, max_size=n), st.integers(1, n - 1))
)


def settings_of(epochs, max_steps=None):
    return SimpleNamespace(epochs=epochs, max_steps=max_steps)


def data_of(lengths, **how):
    """Data of sequences of so many ids, the last of which is the target, to train on and to score."""
    sequences = [Sequence([1] * length, 1) for length in lengths]
    return Data(sequences, sequences, how.pop("max_tokens", 300), **how)


@given(st.lists(sequence, min_size=1, max_size=6), st.integers(1, 33), st.integers(0, 3), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_any_sequences_are_batched_and_padded(sequences, multiple, more_rows, more_targets):
    data = Data(sequences, [], 50, multiple=multiple)
    batch = data.batch(sequences)
    padded = pad_batch(batch, len(sequences) + more_rows, len(batch.targets) + more_targets)
    count = sum(s.targets for s in sequences)
    for one in (batch, padded):
        assert torch.equal(one.labels.flatten()[one.positions[:count]], one.targets[:count])
        assert (one.labels != IGNORE).sum() == count == one.target_tokens
        assert one.weights.sum().item() == pytest.approx(1)
        assert not one.weights[count:].any()
    assert (batch.rows, batch.tokens) == (len(sequences), sum(len(s.ids) - 1 for s in sequences))
    assert torch.equal(padded.ids[: len(sequences)], batch.ids)
    assert batch.ids.shape[1] == max(data.lengths(sequences)) <= 50
    assert data.shape(sequences) == (*batch.ids.shape, len(batch.targets))
    for s, ids, labels in zip(sequences, batch.ids, batch.labels, strict=True):
        assert ids[: len(s.ids) - 1].tolist() == s.ids[:-1]
        assert not ids[len(s.ids) - 1 :].any()
        assert labels[labels != IGNORE].tolist() == s.ids[-s.targets :]


@given(st.lists(sequence, min_size=1, max_size=9), st.integers(1, 12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_largest_batch_is_as_large_as_any(sequences, rows, chance):
    data = Data(sequences, sequences, 50)
    largest = data.largest(sequences, rows)
    any_batch = data.batch(chance.sample(sequences, min(rows, len(sequences))))
    assert len(largest.ids) == len(any_batch.ids)
    assert largest.ids.shape[1] == max(data.lengths(sequences)) >= any_batch.ids.shape[1]
    assert len(largest.targets) >= len(any_batch.targets)


@given(st.lists(sequence, min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_ranks_parts_are_the_batch(sequences, ranks):
    """Of one shape, and their weighted sums over targets add up to that of the whole."""
    data = Data(sequences, [], 50)
    whole, found = data.batch(sequences), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: ranks)
        for rank in range(ranks):
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            own = whole.shard()
            found.append(own)
            assert data.shape(sequences) == (*own.ids.shape, len(own.targets))
            assert (own.rows, own.tokens, own.target_tokens) == (whole.rows, whole.tokens, whole.target_tokens)
    count = sum((own.labels != IGNORE).sum().item() for own in found)
    assert count == whole.target_tokens
    weighted = sum((own.weights.double() * own.targets).sum().item() for own in found)
    assert weighted == pytest.approx((whole.weights.double() * whole.targets).sum().item(), rel=1e-6)
    rows = sorted(row.tolist() for own in found for row in own.ids if row.any())
    assert rows == sorted(row.tolist() for row in whole.ids if row.any())


def test_the_small_batch_has_two_short_rows_with_a_target_each():
    for sequences in ([Sequence(list(range(1, 60)), 50), Sequence([1, 2], 1)], [Sequence(list(range(1, 9)), 2)]):
        for data in (Data(sequences, [], 99), Data([], sequences, 99)):
            small = data.small()
            assert len(small.ids) == min(2, len(sequences))
            assert small.ids.shape[1] <= 32
            assert (small.labels != IGNORE).any(1).all()


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 99), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_deals_each_row_once_and_is_seeded(lengths, batch_size, seed, epoch):
    data = data_of(lengths, batch_size=batch_size)
    batches = data.training_order(seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size) == data.planned_steps(settings_of(1))
    assert batches == data.training_order(seed, epoch)


def test_an_epoch_s_order_saves_padding_and_changes_with_epoch_and_seed():
    rng = random.Random(0)
    lengths = [rng.randint(20, 160) for _ in range(2000)]
    data = data_of(lengths)
    ordered = data.training_order(42, 1)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in ordered)
    assert padded < 1.05 * sum(lengths), "rows of like length are not together"
    assert ordered != data.training_order(42, 2)
    assert ordered != data.training_order(43, 1)


@given(st.lists(st.integers(2, 300), max_size=100), st.integers(1, 2000), st.integers(1, 33))
@settings(max_examples=60, deadline=None)
def test_an_evaluation_deals_each_sequence_once_in_batches_of_few_tokens(lengths, eval_tokens, multiple):
    data = data_of(lengths, eval_tokens=eval_tokens, multiple=multiple)
    batches = list(data.evaluation_order())
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        rows, length, _ = data.shape([data.scored[at] for at in batch])
        assert rows == 1 or rows * length <= eval_tokens
    longest = [max(lengths[at] for at in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_planned_steps_are_those_of_the_whole_run():
    data = data_of([9] * 61, batch_size=4)
    for epochs, max_steps, steps in ((2, None, 32), (2, 20, 20), (2, 99, 32), (0, None, 0), (0, 5, 0)):
        assert data.planned_steps(settings_of(epochs, max_steps)) == steps
    assert data.rows_per_rank == 4
    assert data_of([9] * 61, batch_size=100).rows_per_rank == 61
    assert Data([], data.scored, 300).rows_per_rank == 8
    assert data_of([9, 12, 4]).longest() == 12


def test_content_tells_apart_what_trains_apart():
    """What is hashed for --resume: ids, targets and their order."""
    a, b = Sequence([1, 2, 3], 1), Sequence([1, 2, 4], 1)
    sets = [[a, b], [b, a], [a], [a, a], [a, Sequence([1, 2, 4], 2)], [Sequence([1, 2, 3, 1, 2, 4], 1)]]
    assert len({b"".join(Data(train, [], 9).content()) for train in sets}) == len(sets)
