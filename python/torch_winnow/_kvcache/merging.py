"""Merging tokens whose keys are alike; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow._kvcache import pages
from torch_winnow._kvcache.arguments import check_tensors, integer, number
from torch_winnow._kvcache.compaction import begun, check_movable, claim, finish
from torch_winnow._kvcache.storage import PagedKVCache


def similar_runs(key: Tensor, lengths: Tensor, *, threshold: float, recent: int = 0) -> Tensor:
    """Runs of consecutive tokens, each with a key like the one before: the sets to merge.

    KVMerger (Wang et al., 2024), whose observation is that the keys of neighbouring tokens are
    alike: a token belongs to the run of the one before it if the cosine of their keys is at least
    ``threshold``.

    Args:
        key: ``(B, Hkv, N, D)`` floating point.
        lengths: ``(B,)`` integers; tokens behind them belong to no run.
        threshold: of the cosine; above 1 nothing is alike.
        recent: last tokens of each row that stay by themselves.

    Returns:
        ``(B, Hkv, N)`` int64: the number of each token's run, from 0 on, and -1 for none.

    Raises:
        ValueError: on a wrong shape or a negative ``recent``.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import similar_runs
        >>> key = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0, 2], [0, 3]]).view(1, 1, 5, 2)
        >>> similar_runs(key, torch.tensor([5]), threshold=0.9, recent=1)
        tensor([[[0, 0, 1, 1, 2]]])
    """
    check_tensors(key=key, lengths=lengths)
    if key.dim() != 4 or lengths.shape != key.shape[:1]:
        raise ValueError(
            "key, lengths: expected (B, Hkv, N, D) and (B,), got "
            f"{tuple(key.shape)} and {tuple(lengths.shape)}"
        )
    if integer("recent", recent) < 0:
        raise ValueError(f"recent: expected at least 0, got {recent}")
    threshold = number("threshold", threshold)
    if not key.is_floating_point() or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "key, lengths: expected a floating dtype and int32 or int64, got "
            f"{key.dtype} and {lengths.dtype}"
        )
    tokens = key.shape[2]
    index = torch.arange(tokens, device=key.device)
    ends = lengths.to(key.device)[:, None, None]
    key = key if key.dtype == torch.float64 else key.float()
    alike = F.cosine_similarity(key[:, :, 1:], key[:, :, :-1], dim=3) >= threshold
    first = ~F.pad(alike, (tokens - alike.shape[2], 0), value=False)
    first |= index >= ends - recent
    return torch.where(index < ends, first.cumsum(2) - 1, -1)


def merge_runs(
    key: Tensor,
    value: Tensor,
    runs: Tensor,
    *,
    key_bias: Tensor | None = None,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each run: a weighted mean of its keys and values, and the log of its size.

    The weights are a Gaussian kernel around the run's pivot, the token with the largest ``mass``
    (KVMerger: Wang et al., 2024): ``exp(-(d / mean d)**2)`` for a key at distance ``d`` from the
    pivot's. The bias makes up for the tokens that are gone, as in proportional attention (Bolya et
    al., 2023): with equal keys and values, attention stays what it was.

    Args:
        key: ``(B, Hkv, N, D)`` floating point.
        value: ``(B, Hkv, N, Dv)``.
        runs: ``(B, Hkv, N)`` as :func:`similar_runs` gives them.
        key_bias: ``(B, Hkv, N)``, the log of how many each token stands for already; -inf leaves it
            out. Default: one.
        mass: ``(B, Hkv, N)``, what :func:`attention_mass` gives. Default: the middle of each run is
            its pivot.

    Returns:
        ``(B, Hkv, M, D)`` and ``(B, Hkv, M, Dv)`` in the dtypes of key and value, and the bias
        ``(B, Hkv, M)`` float32 (float64 for float64), where ``M`` is the largest number of runs;
        beyond a head's own runs zeros and a bias of -inf.

    Raises:
        ValueError: on a wrong shape.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import merge_runs
        >>> key = torch.tensor([1.0, 1.0, 5.0]).view(1, 1, 3, 1)
        >>> key, _, bias = merge_runs(key, key, torch.tensor([[[0, 0, 1]]]))
        >>> key.flatten(), bias.exp()
        (tensor([1., 5.]), tensor([[[2., 1.]]]))
    """
    optional = {n: x for n, x in (("key_bias", key_bias), ("mass", mass)) if x is not None}
    check_tensors(key=key, value=value, runs=runs, **optional)
    shapes = {"value": value.shape[:3], "runs": runs.shape}
    shapes |= {n: x.shape for n, x in optional.items()}
    for name, shape in shapes.items():
        if key.dim() != 4 or shape != key.shape[:3]:
            raise ValueError(
                f"{name}: expected (B, Hkv, N) like key up to its last dimension, "
                f"{tuple(key.shape)}, got {tuple(shape)}"
            )
    if runs.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"runs: expected int32 or int64, got {runs.dtype}")
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    count = int(runs.max()) + 1 if runs.numel() > 0 else 0
    if count > key.shape[2]:
        raise ValueError(f"runs: expected numbers below N={key.shape[2]}, got {count - 1}")
    here = runs >= 0
    into = torch.where(here, runs, count)  # one run more for what belongs to none

    def of_runs(x: Tensor, reduce: str) -> Tensor:
        empty = {"sum": 0.0, "amax": -torch.inf, "amin": torch.inf}[reduce]
        result = torch.full((*x.shape[:2], count + 1), empty, dtype=x.dtype, device=x.device)
        return result.scatter_reduce(2, into, x, reduce)

    bias = torch.zeros(runs.shape, dtype=wide, device=key.device)
    bias = bias if key_bias is None else key_bias.to(wide)
    bias = torch.where(here, bias, -torch.inf)
    most = of_runs(bias, "amax").nan_to_num(neginf=0.0)
    share = (bias - most.gather(2, into)).exp()
    counts = share > 0
    place = torch.arange(key.shape[2], device=key.device, dtype=wide).expand(runs.shape)
    if mass is None:
        middle = (of_runs(place, "amin") + of_runs(place, "amax")) / 2
        votes = -(place - middle.gather(2, into)).abs()
    else:
        votes = mass.to(wide).nan_to_num(nan=0.0)
    votes = torch.where(counts, votes, -torch.inf)
    best = votes == of_runs(votes, "amax").gather(2, into)
    pivot = of_runs(torch.where(best, place, torch.inf), "amin").gather(2, into).long()

    keys = key.to(wide)
    distance = (keys - keys.gather(2, pivot[..., None].expand_as(keys))).norm(dim=3)
    # Its own is 0 even where a key is infinite or NaN, which is in nobody else's run.
    distance = torch.where(counts & (place != pivot), distance, 0.0)
    mean = of_runs(distance, "sum") / of_runs(counts.to(wide), "sum").clamp(min=1)
    relative = distance / mean.gather(2, into)
    weight = share * torch.where(distance == 0, 1.0, (-relative.square()).exp().nan_to_num(nan=0.0))
    total = of_runs(weight, "sum")
    weight = weight / total.gather(2, into)

    def merged(x: Tensor) -> Tensor:
        # What has no weight does not count, even NaN.
        parts = torch.where(weight[..., None] > 0, weight[..., None] * x.to(wide), 0.0)
        result = parts.new_zeros(*x.shape[:2], count + 1, x.shape[3])
        result.scatter_add_(2, into[..., None].expand_as(parts), parts)
        return result[:, :, :count].to(x.dtype)

    number = most + of_runs(share, "sum").log()
    return merged(key), merged(value), number[:, :, :count]


def merge_similar_(
    cache: PagedKVCache, *, threshold: float, recent: int = 0, mass: Tensor | None = None
) -> None:
    """Merge the runs of similar tokens of a cache, in every head and layer, and free their blocks.

    :func:`similar_runs` finds them and :func:`merge_runs` merges them. Attention over the cache
    then needs its bias: ``paged_attention(..., key_bias=cache.pool.key_bias[layer])``. Heads and
    layers find different numbers of runs but share the row's length: where there are fewer, the row
    ends with tokens that a bias of -inf hides. Blocks that other rows hold are left as they are.
    In a quantised pool what follows the first merged token is quantised anew.

    Args:
        cache: on a pool with ``key_bias=True``; all layers must have stored the same tokens.
        threshold: of the cosine of neighbouring keys.
        recent: last tokens of each row that stay as they are.
        mass: ``(num_layers, B, Hkv, N)`` with ``N >= max(seq_lens)``, :func:`attention_mass` of
            each layer: it chooses the pivots.

    Returns:
        None; ``cache`` holds the merged tokens, and ``seq_lens`` says how many there are.

    Raises:
        BlockPoolExhausted: if shared blocks must be copied and the pool has too few; nothing has
            changed then.
        RuntimeError: on the ``pages`` of a ``WinnowCache``, which counts its tokens itself.
        ValueError: on a pool without biases, a wrong argument, or layers that are behind.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import BlockPool, PagedKVCache, merge_similar_
        >>> pool = BlockPool(4, num_layers=1, num_kv_heads=1, head_dim=2, block_size=2,
        ...                  dtype=torch.float32, key_bias=True)
        >>> cache = PagedKVCache(pool, batch_size=1)
        >>> key = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]]).view(1, 1, 5, 2)
        >>> cache.append(0, key, key)
        >>> merge_similar_(cache, threshold=0.9)
        >>> cache.seq_lens, pool.key_bias[0, cache.block_table[0, 0], 0].exp()
        (tensor([2], dtype=torch.int32), tensor([2., 3.]))
    """
    if not isinstance(cache, PagedKVCache):
        raise ValueError(f"cache: expected a PagedKVCache, got {type(cache).__name__}")
    pool, lengths = cache.pool, cache.seq_lens
    if pool.key_bias is None:
        raise ValueError(
            "cache: expected a pool made with key_bias=True, which merged tokens need, got one "
            "without"
        )
    check_movable(cache)
    tokens = int(lengths.max()) if cache.batch_size > 0 else 0
    expected = (pool.num_layers, cache.batch_size, pool.num_kv_heads)
    if mass is not None:
        check_tensors(mass=mass)
    if mass is not None and (mass.shape[:3] != expected or mass.shape[3] < tokens):
        raise ValueError(
            f"mass: expected (num_layers, B, Hkv, N) = ({', '.join(map(str, expected))}, N) with N "
            f"of at least {tokens}, got {tuple(mass.shape)}"
        )

    def stored(of_blocks: Tensor, scales: Tensor | None = None) -> Tensor:
        """``(B, Hkv, tokens, D)`` of one layer's pages, in float32 where they hold codes."""
        table = cache.block_table.clamp(min=0).long()
        numbers = of_blocks[table]
        if scales is not None:
            numbers = numbers.float() * scales[table][..., None, None]
        return numbers.transpose(1, 2).flatten(2, 3)[:, :, :tokens]

    runs = torch.stack(
        [
            similar_runs(
                stored(key_pages, *scales[:1]), lengths, threshold=threshold, recent=recent
            )
            for (key_pages, _), scales in zip(pool._layers, pool._scales, strict=True)
        ]
    )
    place = torch.arange(tokens, device=runs.device)
    numbers = (runs.amax(3) + 1) if tokens > 0 else runs.new_zeros(expected)
    kept = numbers.amax((0, 2))
    # Up to the first token that joins another nothing changes, in any head or layer.
    joins = ((runs >= 0) & (runs != place)).any(0).any(1)
    changes = F.pad(joins, (0, 1))[:, 1:].cumsum(1) > 0
    targets = torch.where(changes & (place < kept[:, None]), place, -1)
    targets = targets[:, : int(kept.max()) if kept.numel() > 0 else 0].cpu().contiguous()
    with pool._lock:
        claim(cache, targets)
        anew = begun(cache, targets)
        for layer, (of_blocks, scales) in enumerate(zip(pool._layers, pool._scales, strict=True)):
            key, value = map(stored, of_blocks, scales or (None, None))
            key, value, bias = merge_runs(
                key,
                value,
                runs[layer],
                key_bias=stored(pool.key_bias[layer, ..., None])[..., 0],
                mass=None if mass is None else mass[layer, :, :, :tokens],
            )
            # Hidden tokens repeat the last one, so that summaries stay as tight as they are.
            last = (numbers[layer, :, :, None] - 1).clamp(min=0)
            source = torch.minimum(place[: targets.shape[1]], last)[..., None]
            key, value = (x.gather(2, source.expand(-1, -1, -1, x.shape[3])) for x in (key, value))
            bias = F.pad(bias, (0, targets.shape[1] - bias.shape[2]), value=-torch.inf)
            pages.start_anew(pool, layer, anew)
            pages.store(pool, layer, key, value, cache._mirror, targets)
            pages.store_bias(pool, layer, cache._mirror, targets, bias)
        finish(cache, kept, targets)
