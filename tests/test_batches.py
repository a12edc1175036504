"""Sequences, batches of them in both layouts, and their order. python -m pytest tests/test_batches.py"""

import math
import random
from itertools import combinations, pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowmem.training import layouts, parallel
from lowmem.training.batches import IGNORE, Sequence, pad_batch
from lowmem.training.data import Data
from lowmem.training.layouts import Lines, PaddedRows

LAYOUTS = st.sampled_from([PaddedRows, Lines])


@st.composite
def a_sequence(draw):
    ids = draw(st.lists(st.integers(0, 399), min_size=2, max_size=50))
    borders = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=4)) if len(ids) > 2 else {1, 2})
    spans = list(pairwise(borders))
    sequence = Sequence.ending(ids, 1)
    sequence.spans = tuple(spans[::2])
    return sequence


SEQUENCES = st.lists(a_sequence(), min_size=1, max_size=9)


def data_of(sequences, layout=PaddedRows, few_lengths=False, **how):
    """Data to train on and to score."""
    data = Data(sequences, sequences, how.pop("max_tokens", 300), **how)
    data.layout = layout(data.longest(), data.max_tokens, few_lengths)
    return data


def of_lengths(lengths, *layout, **how):
    """Data of sequences of so many ids, the last of which is the target."""
    return data_of([Sequence.ending([1] * length, 1) for length in lengths], *layout, **how)


def rows_of(batch):
    """[(ids, {index of a token: the id to predict after it})] of the rows of a batch, those that fill it up too."""
    starts = [0, *[batch.ids.shape[1]] * len(batch.ids)] if batch.row_starts is None else batch.row_starts.tolist()
    found = []
    for row, (start, end) in enumerate(pairwise(starts)):
        ids, labels = (
            (batch.ids[0, start:end], batch.labels[0, start:end])
            if batch.row_starts is not None
            else (batch.ids[row], batch.labels[row])
        )
        found.append((ids.tolist(), {k: label for k, label in enumerate(labels.tolist()) if label != IGNORE}))
    return found


def targets_of(sequence):
    return {k - 1: sequence.ids[k] for start, end in sequence.spans for k in range(start, end)}


@given(SEQUENCES, LAYOUTS, st.booleans(), st.integers(0, 3), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_any_sequences_are_batched_and_filled_up(sequences, layout, few_lengths, more_rows, more_targets):
    data = data_of(sequences, layout, few_lengths, max_tokens=64)
    batch, shape = data.batch(sequences), data.shape(sequences)
    count, tokens = sum(s.targets for s in sequences), [s.tokens for s in sequences]
    larger = shape._replace(targets=shape.targets + more_targets, row_starts=shape.row_starts + more_rows)
    larger = larger._replace(rows=larger.rows + more_rows * (layout is PaddedRows))
    padded = pad_batch(batch, larger)
    for one in (batch, padded):
        assert torch.equal(one.labels.flatten()[one.indices[:count]], one.targets[:count])
        assert (one.labels != IGNORE).sum() == count == one.target_tokens
        assert one.weights.sum().item() == pytest.approx(1)
        assert not one.weights[count:].any()
        assert one.ids.shape[1] == shape.length
        for s, (ids, targets) in zip(sequences, rows_of(one), strict=False):
            assert ids[: s.tokens] == s.ids.tolist()[:-1]
            assert targets == targets_of(s)
            assert not any(ids[s.tokens :])
        assert not any(targets or any(ids) for ids, targets in rows_of(one)[len(sequences) :])
    assert (batch.rows, batch.tokens) == (len(sequences), sum(tokens))
    assert padded.shape[0] == larger.rows
    if layout is Lines:
        assert len(padded.row_starts) == larger.row_starts >= len(batch.row_starts)
        assert padded.row_starts[-1] == shape.length
        filled = batch.row_starts.diff()[len(sequences) :]
        assert filled.sum() == shape.length - sum(tokens) <= (max(127, shape.length / 16) if few_lengths else 0)
        assert (filled <= min(128, max(tokens))).all(), "neither one long row nor rows longer than the data's"
        positions = [k for start, end in pairwise(batch.row_starts.tolist()) for k in range(end - start)]
        assert batch.position_ids.tolist() == [positions]
        assert max(positions) < batch.longest <= 128
    else:
        assert shape.length <= 64


@pytest.mark.parametrize(("layout", "parts", "least"), [(PaddedRows, 8, 32), (Lines, 16, 128)])
def test_lengths_are_few_and_not_much_longer(layout, parts, least):
    lengths = [layout(1, 10**6, few_lengths=True).length([length]) for length in range(1, 70_000)]
    assert all(few - length < max(least, length / parts) for length, few in enumerate(lengths, 1))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) < 12 * parts
    assert not any(few % least for few in lengths)


def test_rows_of_20_to_8000_tokens_make_some_twenty_lengths():
    """Each is a CUDA graph. All batches of an epoch hold about equally many tokens, but those of the longest rows."""
    rng = random.Random(0)
    lengths = [min(8000, max(20, int(rng.lognormvariate(6, 1)))) for _ in range(20_000)]
    data = of_lengths(lengths, Lines, True, max_tokens=8192)
    assert len(data.training_shapes()) <= 24
    batches = list(data.training_batches())
    true, filled = sum(data.batch(b).tokens for b in batches), sum(data.shape(b).length for b in batches)
    assert filled < 1.05 * true
    assert len(data.evaluation_shapes()) < 4


def test_the_tail_of_a_line_is_many_short_rows():
    data = of_lengths([3001, 5, 5], Lines, True, max_tokens=8192)
    batch = data.batch(data.train)
    assert batch.row_starts.tolist() == [0, 3000, 3004, 3008, 3072]
    assert data.shape(data.train).row_starts == 5, "as many as the batch of that length that is filled up most"
    data = of_lengths([20_000, 5], Lines, True, max_tokens=32_768)
    assert data.batch(data.train).row_starts.diff().tolist() == [19_999, 4, *[128] * 3, 93]


@given(SEQUENCES, LAYOUTS, st.booleans(), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_largest_batch_is_as_large_as_any(sequences, layout, few_lengths, batch_size, epochs):
    data = data_of(sequences, layout, few_lengths, max_tokens=64, batch_size=batch_size, epochs=epochs)
    for batches, shapes in (
        (data.training_batches, data.training_shapes()),
        (data.evaluation_batches, data.evaluation_shapes()),
    ):
        largest = data.largest(shapes)
        assert [s.length for s in shapes] == sorted({data.shape(b).length for b in batches()}, reverse=True)
        assert largest.ids.numel() == max(s.rows * s.length for s in shapes)
        for sequences in batches():
            shape = data.batch(sequences).shape
            (room,) = [room for room in shapes if room.length == shape.length]
            assert all(x <= y for x, y in zip(shape, room, strict=True))
            assert shape.targets <= largest.shape.targets
            assert shape.row_starts <= largest.shape.row_starts


@pytest.mark.parametrize("layout", [PaddedRows, Lines])
def test_batches_are_the_same_with_graphs_and_when_other_ranks_go_on(layout, monkeypatch):
    """--no_compile, the length of a run and the number of GPUs may change in the middle of an epoch."""
    rng = random.Random(0)
    lengths = [int(min(290, max(5, rng.lognormvariate(4, 1)))) for _ in range(400)]
    plain, graphs = of_lengths(lengths, layout, False), of_lengths(lengths, layout, True)
    order = plain.training_order(1)
    assert graphs.training_order(1) == order
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    assert [sorted(batch) for batch in plain.training_order(1)] == [sorted(batch) for batch in order]


@given(SEQUENCES, LAYOUTS, st.booleans(), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_the_ranks_parts_are_the_batch(sequences, layout, few_lengths, ranks):
    """Of one shape, and their weighted sums over targets add up to that of the whole."""
    data = data_of(sequences, layout, few_lengths, max_tokens=64)
    whole, found = data.batch(sequences), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: ranks)
        for rank in range(ranks):
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            own = data.batch(sequences)
            found.append(own)
            assert own.shape[:3] == data.shape(sequences)[:3]
            assert own.shape.row_starts <= data.shape(sequences).row_starts
            assert ranks == 1 or own.shape == data.shape(sequences)
            assert (own.rows, own.tokens, own.target_tokens) == (whole.rows, whole.tokens, whole.target_tokens)
    assert sum((own.labels != IGNORE).sum().item() for own in found) == whole.target_tokens
    weighted = sum((own.weights.double() * own.targets).sum().item() for own in found)
    assert weighted == pytest.approx((whole.weights.double() * whole.targets).sum().item(), rel=1e-6)
    rows = sorted(
        (ids[: max(targets) + 1], sorted(targets)) for own in found for ids, targets in rows_of(own) if targets
    )
    assert rows == sorted((s.ids.tolist()[: max(targets_of(s)) + 1], sorted(targets_of(s))) for s in sequences)


@pytest.mark.parametrize("layout", [PaddedRows, Lines])
def test_the_small_batch_has_two_short_rows_with_a_target_each(layout):
    for sequences in (
        [Sequence.ending(range(1, 60), 50), Sequence.ending([1, 2], 1)],
        [Sequence.ending(range(1, 9), 2)],
    ):
        for few_lengths in (False, True):
            rows = rows_of(data_of(sequences, layout, few_lengths).small())
            kept = [(ids, targets) for ids, targets in rows if targets]
            assert len(kept) == 2, "one row alone comes twice, or none could see it"
            assert all(len(ids) <= 32 and max(targets) < 32 for ids, targets in kept)
            assert all(targets[k] == ids[k + 1] for ids, targets in kept for k in targets if k < max(targets))


@given(st.lists(a_sequence(), min_size=1, max_size=1), st.integers(0, 30), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_a_slice_keeps_the_targets_that_it_can_predict(sequences, start, length):
    (whole,) = sequences
    start = min(start, whole.tokens - 1)
    part = whole.slice(start, start + length)
    assert part.ids == whole.ids[start : start + length]
    expected = {k - start for a, b in whole.spans for k in range(a, b)} & set(range(1, len(part.ids)))
    assert {k for a, b in part.spans for k in range(a, b)} == expected


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=400), LAYOUTS, st.integers(1, 40), st.integers(0, 99),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_an_epoch_deals_each_row_once_and_is_seeded(lengths, layout, batch_size, seed, epoch):
    data = of_lengths(lengths, layout, batch_size=batch_size, seed=seed)
    batches = data.training_order(epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size) == data.planned_steps()
    assert max(map(len, batches)) <= batch_size
    assert batches == data.training_order(epoch)


@pytest.mark.parametrize("layout", [PaddedRows, Lines])
def test_the_shapes_are_those_of_all_steps(layout):
    """So that what graphs need is compiled before, and no epoch takes more memory than was planned."""
    rng = random.Random(0)
    lengths = [int(min(290, max(5, rng.lognormvariate(4, 1)))) for _ in range(700)]
    for max_steps in (None, 100):
        data = of_lengths(lengths, layout, True, epochs=5, max_steps=max_steps)
        order = [rows for epoch in range(1, 6) for rows in data.training_order(epoch)][:max_steps]
        assert len(order) == data.planned_steps() == (max_steps or 5 * 88)
        steps = [data.shape([data.train[at] for at in rows]) for rows in order]
        shapes = {shape.length: shape for shape in data.training_shapes()}
        assert {shape.length for shape in steps} == shapes.keys()
        assert all(x <= y for shape in steps for x, y in zip(shape, shapes[shape.length], strict=True))
    endless = of_lengths(lengths, layout, True, epochs=10**9)
    assert len(list(endless.training_batches())) == 88 * (20_000 // 88)
    assert data.training_shapes() is data.training_shapes(), "they take a second for 100,000 rows"
    data.layout.few_lengths = False
    assert len(data.training_shapes()) > len(shapes)


@pytest.mark.parametrize("layout", [PaddedRows, Lines])
@pytest.mark.parametrize(("count", "batch_size", "most"), [(400, 4, 0.03), (500, 8, 0.03), (500, 2, 0.2)])
def test_other_rows_meet_in_each_epoch(layout, count, batch_size, most):
    """Also of few rows, no two of one length. Of two in a line the long ones need short ones.

    By chance alone a pair meets again in 0.2 to 1.4 % of cases. With five seeds `Lines` had 1.6 % at most, 12 in twos.
    """
    rng = random.Random(0)
    data = of_lengths(rng.sample(range(20, 4000), count), layout, batch_size=batch_size, max_tokens=4096)
    first, second = (
        {pair for batch in data.training_order(epoch) for pair in combinations(sorted(batch), 2)} for epoch in (1, 2)
    )
    assert len(first & second) < (most if layout is Lines else 0.4) * len(first)


@pytest.mark.parametrize("layout", [PaddedRows, Lines])
def test_an_epoch_s_order_changes_with_epoch_and_seed_and_suits_its_layout(layout):
    rng = random.Random(0)
    lengths = [rng.randint(20, 160) for _ in range(2000)]
    data = of_lengths(lengths, layout)
    ordered = data.training_order(1)
    if layout is PaddedRows:
        padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in ordered)
        assert padded < 1.05 * sum(lengths), "rows of like length are not together"
    else:
        sums = [sum(lengths[row] for row in batch) for batch in ordered]
        assert max(sums) < 1.15 * sum(lengths) / len(ordered), "batches differ in their tokens"
        assert {len(batch) for batch in ordered} == {8}
    assert ordered != data.training_order(2)
    assert ordered != of_lengths(lengths, layout, seed=43).training_order(1)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_groups_are_balanced(sizes, count):
    """No group could give its smallest to one with room for more rows, and both be better off."""
    most = math.ceil(len(sizes) / count)
    groups = layouts.balanced(sizes, [most] * count)
    assert sorted(at for group in groups for at in group) == list(range(len(sizes)))
    assert max(map(len, groups)) <= most
    sums = [sum(sizes[at] for at in group) for group in groups]
    with_room = [total for total, group in zip(sums, groups, strict=True) if len(group) < most]
    for total, group in zip(sums, groups, strict=True):
        assert not with_room or total - min((sizes[at] for at in group), default=0) <= min(with_room)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99), st.data())
@settings(max_examples=80, deadline=None)
def test_an_exchange_empties_no_group_and_fills_none(sizes, count, seed, data):
    """Each index stays in one group, groups have as many as before, and none exceeds its room that did not, or by more."""
    count = min(count, len(sizes))
    groups = layouts.balanced(sizes, [math.ceil(len(sizes) / count)] * count)
    before, most = [[*group] for group in groups], 2 * max(1, sum(sizes) // count)
    rooms = [data.draw(st.integers(0, most)) for _ in groups]
    layouts.exchange(groups, sizes, rooms, random.Random(seed))
    assert sorted(at for group in groups for at in group) == list(range(len(sizes)))
    assert list(map(len, groups)) == list(map(len, before))
    for now, then, room in zip(groups, before, rooms, strict=True):
        assert sum(sizes[at] for at in now) <= max(room, sum(sizes[at] for at in then))


def test_groups_that_are_too_full_are_mended():
    sizes = [9, 1, 5, 4, 3, 3]
    groups = [[0, 2], [1, 3], [4, 5]]
    layouts.exchange(groups, sizes, [10, 9, 6], random.Random(0))
    assert groups == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_that_fit_nowhere_are_not_tried_for_long(batch_size):
    """Rows of very different lengths, a batch of few: thousands of lines are too full, and nothing can be exchanged."""
    tried = []

    class Counting(random.Random):
        def randrange(self, *args):
            tried.append(args)
            return super().randrange(*args)

    rng = random.Random(0)
    lengths = [min(4000, max(20, int(rng.lognormvariate(6, 1)))) for _ in range(10_000)]
    Lines(4000, 8192, True).deal(lengths, batch_size, Counting(0))
    assert len(tried) < 3 * 2 * layouts.HOPELESS_GROUPS * layouts.EXCHANGE_TRIES  # of 15 million for all


@pytest.mark.parametrize(("length", "batch_size"), [((10, 30), 4), ((20, 40), 2), ((5, 15), 8)])
def test_lines_shorter_than_a_tile_have_equally_many_tokens(length, batch_size):
    rng = random.Random(0)
    lengths = [rng.randint(*length) for _ in range(2000)]
    data = of_lengths(lengths, Lines, True, batch_size=batch_size)
    assert {shape.length for shape in data.training_shapes()} == {128}
    sums = [sum(lengths[row] for row in batch) for batch in data.training_order(1)]
    assert max(sums) - min(sums) < max(length)


@pytest.mark.parametrize(
    ("rows", "lengths"), [((30, 150), {640, 768}), ((25, 145), {640, 768}), ((22, 138), {512, 640})]
)
def test_lines_are_filled_to_one_of_two_lengths(rows, lengths):
    """Those of few lengths that GPUs take without a part of a tile."""
    rng = random.Random(0)
    data = of_lengths([rng.randint(*rows) for _ in range(4096)], Lines, True)
    batches = list(data.training_batches())
    found = [data.shape(batch).length for batch in batches]
    assert {*found} == lengths
    assert sum(found) < 1.015 * sum(s.tokens for batch in batches for s in batch)


def test_lines_of_ranks_are_filled_too(monkeypatch):
    """HellaSwag's lengths, about; 32 rows on four ranks."""
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    rng = random.Random(0)
    for rows in ((22, 138), (25, 145), (30, 150)):
        data = of_lengths([rng.randint(*rows) for _ in range(4096)], Lines, True, batch_size=32)
        batches = list(data.training_batches())
        assert 4 * sum(data.shape(b).length for b in batches) < 1.04 * sum(s.tokens for b in batches for s in b)
        assert len({data.shape(b).length for b in batches}) <= 4


def test_ranks_get_alike_many_tokens(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    rng = random.Random(0)
    data = of_lengths([rng.randint(20, 160) for _ in range(512)], Lines, batch_size=32)
    for batch in data.training_batches():
        sums = [sum(s.tokens for s in shard) for shard in parallel.deal_to_ranks(batch)]
        assert max(sums) < 1.1 * min(sums)
    few = of_lengths([101, 101, 101, 101, 51, 51, 51, 51, 11], Lines, batch_size=9)
    (batch,) = few.training_batches()
    assert [sum(s.tokens for s in shard) for shard in parallel.deal_to_ranks(batch)] == [160, 150, 150, 150]


@given(st.lists(st.integers(2, 300), max_size=100), LAYOUTS, st.integers(1, 2000), st.booleans())
@settings(max_examples=80, deadline=None)
def test_an_evaluation_deals_each_sequence_once_in_batches_of_few_tokens(lengths, layout, eval_tokens, few_lengths):
    data = of_lengths(lengths, layout, few_lengths, eval_tokens=eval_tokens)
    batches = data.evaluation_order()
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        tokens = [lengths[at] - 1 for at in batch]
        if layout is PaddedRows:
            assert len(batch) == 1 or data.batch([data.scored[at] for at in batch]).ids.numel() <= eval_tokens
        else:
            assert sum(tokens) <= 2 * max(eval_tokens, *(length - 1 for length in lengths))
    if layout is PaddedRows:
        longest = [max(lengths[at] for at in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)


def test_planned_steps_are_those_of_the_whole_run():
    for epochs, max_steps, steps in ((2, None, 32), (2, 20, 20), (2, 99, 32), (0, None, 0), (0, 5, 0)):
        data = of_lengths([9] * 61, batch_size=4, epochs=epochs, max_steps=max_steps)
        assert data.planned_steps() == len(list(data.training_batches())) == steps
    assert of_lengths([9, 12, 4]).longest() == 11


def test_content_tells_apart_what_trains_apart():
    """What is hashed for --resume: ids, targets and their order."""
    a, b = Sequence.ending([1, 2, 3], 1), Sequence.ending([1, 2, 4], 1)
    whole = Sequence.ending([1, 2, 3, 1, 2, 4], 1)
    sets = [[a, b], [b, a], [a], [a, a], [a, Sequence.ending([1, 2, 4], 2)], [whole]]
    assert len({b"".join(Data(train, [], 9).content()) for train in sets}) == len(sets)
