"""What the eviction policies keep, against loops over the papers' definitions."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.kvcache import fastkv_positions, h2o_positions, snapkv_positions

INF, NAN = float("inf"), float("nan")


def padded(positions, count):
    return torch.tensor(sorted(positions) + [-1] * (count - len(positions)))


def best(votes, count):
    """The earliest of equal votes."""
    return sorted(range(len(votes)), key=lambda j: -votes[j])[:count]


@pytest.mark.parametrize(("heavy", "recent"), [(4, 3), (0, 3), (5, 0), (0, 0), (30, 4)])
def test_h2o(heavy, recent):
    for mass in (torch.rand(3, 2, 20), torch.randint(0, 3, (3, 2, 20)).double()):
        lengths = torch.tensor([20, 11, 0], dtype=torch.int32)
        kept = h2o_positions(mass, lengths, heavy=heavy, recent=recent)
        assert kept.shape == (3, 2, heavy + recent)
        for b, length in enumerate(lengths.tolist()):
            old = max(0, length - recent)
            for h in range(2):
                expected = best(mass[b, h, :old].tolist(), heavy) + list(range(old, length))
                assert torch.equal(kept[b, h], padded(expected, heavy + recent))


def test_h2o_at_its_edges():
    mass = torch.tensor([[[NAN, INF, -INF, 1.0, NAN, 0.5]]])
    kept = h2o_positions(mass, torch.tensor([6]), heavy=3, recent=1)
    assert kept.tolist() == [[[0, 1, 3, 5]]]
    assert h2o_positions(mass[:0], torch.tensor([]).long(), heavy=1, recent=1).shape == (0, 1, 2)
    assert (h2o_positions(mass[..., :0], torch.tensor([0]), heavy=1, recent=1) == -1).all()


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_snapkv_and_fastkv(pooling, kernel_size):
    mass = torch.rand(3, 2, 30).double()
    lengths = torch.tensor([30, 17, 4])
    options = {"capacity": 9, "window": 4, "kernel_size": kernel_size, "pooling": pooling}
    kept = snapkv_positions(mass, lengths, **options)
    shared = fastkv_positions(mass, lengths, **options)
    assert kept.shape == (3, 2, 9)
    assert shared.shape == (3, 9)
    reach = kernel_size // 2

    def expected(mass, length):
        votes = mass[: length - 4].tolist()
        around = [
            [votes[i] for i in range(j - reach, j + reach + 1) if 0 <= i < len(votes)]
            for j in range(len(votes))
        ]
        pooled = [sum(x) / kernel_size if pooling == "avg" else max(x) for x in around]
        return padded(best(pooled, 5) + list(range(length - 4, length)), 9)

    for b, length in enumerate(lengths.tolist()):
        for h in range(2):
            assert torch.equal(kept[b, h], expected(mass[b, h], length))
        assert torch.equal(shared[b], expected(mass[b].sum(0), length))


def test_votes_of_the_window_and_behind_the_end_do_not_count():
    mass = torch.rand(1, 1, 20)
    options = {"capacity": 8, "window": 5}
    kept = snapkv_positions(mass, torch.tensor([15]), **options)
    mass[..., 10:] = NAN
    assert torch.equal(snapkv_positions(mass, torch.tensor([15]), **options), kept)


def test_errors_name_the_argument():
    mass, lengths = torch.rand(2, 2, 8), torch.tensor([8, 3])
    with pytest.raises(ValueError, match=r"mass: expected \(B, Hkv, N\).*got \(2, 8\)"):
        h2o_positions(mass[0], lengths, heavy=1, recent=1)
    with pytest.raises(ValueError, match="mass: .*int64"):
        fastkv_positions(mass.long(), lengths, capacity=3, window=1)
    with pytest.raises(ValueError, match=r"seq_lens: expected \(B,\) with B=2.*got \(1,\)"):
        h2o_positions(mass, lengths[:1], heavy=1, recent=1)
    with pytest.raises(ValueError, match="seq_lens: expected integers, got torch.float32"):
        h2o_positions(mass, lengths.float(), heavy=1, recent=1)
    with pytest.raises(ValueError, match="heavy: expected at least 0, got -1"):
        h2o_positions(mass, lengths, heavy=-1, recent=1)
    with pytest.raises(ValueError, match="capacity: expected at least window = 4, got 3"):
        snapkv_positions(mass, lengths, capacity=3, window=4)
    with pytest.raises(ValueError, match="kernel_size: expected an odd number .*got 4"):
        snapkv_positions(mass, lengths, capacity=5, window=4, kernel_size=4)
    with pytest.raises(ValueError, match="pooling: expected 'avg' or 'max', got 'mean'"):
        fastkv_positions(mass, lengths, capacity=5, window=4, pooling="mean")
