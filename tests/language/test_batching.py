"""Rectangles of tokens: what is padding, what is learned, and that packing and buckets lose nothing."""

import pytest
import torch

from upslope.language import batching

PROMPTS, COMPLETIONS = [[5, 6, 7], [8]], [[9, 1], [1]]


def test_padding_on_either_side() -> None:
    right, left = (batching.pad(PROMPTS, COMPLETIONS, 0, left=side) for side in (False, True))
    assert right.ids.tolist() == [[5, 6, 7, 9, 1], [8, 1, 0, 0, 0]]
    assert right.response.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert left.ids.tolist() == [[5, 6, 7, 9, 1], [0, 0, 0, 8, 1]]
    assert left.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]


def test_the_end_of_sequence_is_learned_where_it_is_the_padding_too() -> None:
    batch = batching.pad(PROMPTS, COMPLETIONS, pad_id=1)
    assert batch.ids[1].tolist() == [8, 1, 1, 1, 1]
    assert batch.response[1].tolist() == [False, True, False, False, False]
    assert batch.attention[1].tolist() == [True, True, False, False, False]


def test_packing_keeps_every_example_whole() -> None:
    prompts = [[k] * (k % 4 + 1) for k in range(2, 12)]
    completions = [[20 + k] * (k % 3 + 1) for k in range(2, 12)]
    packed = batching.pack(prompts, completions, 0, length=12)
    assert packed.segment is not None
    found = []
    for row in range(len(packed.ids)):
        for k in range(int(packed.segment[row].max()) + 1):
            inside = packed.segment[row] == k
            assert packed.positions[row][inside].tolist() == list(range(int(inside.sum())))
            response = packed.response[row][inside]
            ids = packed.ids[row][inside]
            found.append((ids[~response].tolist(), ids[response].tolist()))
    assert sorted(found) == sorted(zip(prompts, completions, strict=True))
    assert len(packed.ids) < len(prompts)
    assert bool((packed.attention == (packed.segment >= 0)).all())


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="length is 4, but example 0 has 5 tokens"):
        batching.pack(PROMPTS, COMPLETIONS, 0, length=4)


def test_buckets_hold_everything_once_and_are_small() -> None:
    lengths = torch.randint(1, 40, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = batching.buckets(lengths, tokens=80)
    assert sorted(i for group in groups for i in group) == list(range(100))
    assert all(len(group) * max(lengths[i] for i in group) <= 80 for group in groups)
    assert batching.buckets([100], tokens=80) == [[0]]


def test_a_bucket_ends_where_its_padding_costs_more_than_another_pass() -> None:
    """Two of 40 and many of 10: apart, as 30 tokens of padding each would soon be more than PASS; few stay together."""
    assert batching.buckets([40, 40, *[10] * 20], tokens=10**6) == [[0, 1, 2, 3], list(range(4, 22))]
    assert batching.buckets([40, 40, 10, 10], tokens=10**6) == [[0, 1, 2, 3]]
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    groups = batching.buckets(lengths, tokens=10**6)
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        padding = sum(lengths[group[0]] - lengths[i] for i in group)
        assert padding <= batching.PASS
        if after:
            assert padding + lengths[group[0]] - lengths[after[0]] > batching.PASS
