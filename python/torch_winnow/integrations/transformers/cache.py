"""``WinnowCache``: what transformers asks of a cache, answered by pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

from torch_winnow._kvcache.arguments import integer, integers
from torch_winnow.integrations.transformers.sparse import BlockSparse
from torch_winnow.integrations.transformers.storage import PagedStorage
from torch_winnow.integrations.transformers.view import PagedStates
from torch_winnow.kvcache import BlockPool, PagedKVCache

_SLIDING = ("sliding_attention", "chunked_attention")
_LAYER_TYPES = ("full_attention", *_SLIDING, "minimax_m3_sparse")


class Columns(int):
    """A number of columns that knows whose: how the mask function meets the cache."""

    storage: PagedStorage

    @staticmethod
    def of(storage: PagedStorage, count: int) -> Columns:
        columns = Columns(count)
        columns.storage = storage
        return columns


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a :class:`WinnowCache`. All share one block table, which moves as a whole."""

    is_croppable = True
    supports_early_init = False  # nothing is gained by a pool before the batch is known

    def __init__(self, storage: PagedStorage, index: int, is_sliding: bool) -> None:
        self.storage = storage
        self.index = index
        self.is_sliding = is_sliding
        self.indexer_keys: Tensor | None = None

    @property
    def keys(self) -> PagedStates | None:
        """``(B, Hkv, N, D)``, None before the first forward pass."""
        return PagedStates.of(self.storage, self.index, 0) if self.is_initialized else None

    @property
    def values(self) -> PagedStates | None:
        """``(B, Hkv, N, Dv)``, None before the first forward pass."""
        return PagedStates.of(self.storage, self.index, 1) if self.is_initialized else None

    @property
    def is_initialized(self) -> bool:
        return self.storage.rows >= 0

    @property
    def batch_size(self) -> int:
        return self.storage.rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pool is made by the first update."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.storage.append(self.index, key_states, value_states)
        return (
            PagedStates.of(self.storage, self.index, 0, in_step=True),
            PagedStates.of(self.storage, self.index, 1, in_step=True),
        )

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Keys of a model's own block selection (MiniMax M3), ``(B, 1, T, D)``; small and dense."""
        before = self.indexer_keys
        self.indexer_keys = idx_k if before is None else torch.cat([before, idx_k], dim=-2)
        return self.indexer_keys

    def get_seq_length(self) -> int:
        return self.storage.columns[self.index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.storage.forget()  # a new step begins, whose implementation may announce nothing
        return Columns.of(self.storage, self.get_seq_length() + query_length), 0

    def get_max_length(self) -> int:
        limit = self.storage.max_cache_len
        return -1 if limit is None else limit

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise RuntimeError("WinnowCache: layers share one table, call reorder_cache of the cache")

    def reset(self) -> None:
        raise RuntimeError("WinnowCache: layers share one table, call reset of the cache")


class WinnowCache(Cache):  # type: ignore[misc]
    """Keys and values of a transformers model in pages of one :class:`BlockPool`.

    ``model.generate(..., past_key_values=WinnowCache(model.config))``, for greedy search, sampling,
    beam search, assisted generation and chunked prompts. Reordering beams, repeating and selecting
    rows move table entries and reference counts, no keys; ``copy.deepcopy(cache)`` continues a
    prompt that both then share.

    Args:
        config: of the model.
        max_cache_len: columns that a row may fill; the pool is then made once, for the batch of the
            first forward pass. Default: the pool grows as needed, by a quarter.
        block_size: tokens in a block.
        sparse: :class:`BlockSparse` decoding. Default: every step attends everything.
        pool: a pool to share with other caches; it does not grow. Its block size counts, and its
            ``summaries`` are those of ``sparse``.

    Attributes:
        pages: the :class:`PagedKVCache`, once there is one.

    Raises:
        BlockPoolExhausted: from a forward pass, beyond ``max_cache_len`` or the given pool.
        ValueError: on layers that hold something else than keys and values of one shape.

    Example:
        >>> import torch
        >>> from transformers import MistralConfig, MistralForCausalLM
        >>> from torch_winnow.integrations.transformers import WinnowCache, register
        >>> register()
        >>> config = MistralConfig(
        ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
        ...     attn_implementation="winnow",
        ... )
        >>> model = MistralForCausalLM(config).eval()
        >>> cache = WinnowCache(config, block_size=4)
        >>> with torch.no_grad():
        ...     _ = model(torch.arange(10)[None], past_key_values=cache)
        >>> cache.batch_repeat_interleave(3)  # three continuations, one prompt
        >>> cache.pages.block_table
        tensor([[0, 1, 2],
                [0, 1, 2],
                [0, 1, 2]], dtype=torch.int32)
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int | None = None,
        block_size: int = 64,
        *,
        sparse: BlockSparse | None = None,
        pool: BlockPool | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, PretrainedConfig):
            raise ValueError(f"config: expected the config of a model, got {config!r}")
        for name, value in (("block_size", block_size), ("max_cache_len", max_cache_len)):
            if value is not None and integer(name, value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if sparse is not None and not isinstance(sparse, BlockSparse):
            raise ValueError(f"sparse: expected a BlockSparse or None, got {sparse!r}")
        if cache_dtype not in (None, torch.int8, torch.float8_e4m3fn):
            raise ValueError(
                "cache_dtype: expected torch.int8, torch.float8_e4m3fn or None, got "
                f"{cache_dtype!r}"
            )
        layer_types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        for index, kind in enumerate(layer_types):
            if kind not in _LAYER_TYPES:
                raise ValueError(
                    f"config: layer {index} is {kind!r}, and pages hold keys and values of "
                    f"{', '.join(_LAYER_TYPES)} only; use DynamicCache(config=config), which works "
                    "with attention 'winnow' too"
                )
        if pool is not None:
            if not isinstance(pool, BlockPool):
                raise ValueError(f"pool: expected a BlockPool or None, got {pool!r}")
            if pool.num_layers != len(layer_types):
                raise ValueError(
                    f"pool: expected num_layers={len(layer_types)} as in config, got {pool!r}"
                )
            if sparse is not None and pool.summary_kind != sparse.summary:
                raise ValueError(
                    f"pool: expected summaries={sparse.summary!r} as in sparse, got {pool!r}"
                )
            if cache_dtype not in (None, pool.dtype):
                raise ValueError(f"cache_dtype: expected None or that of the pool, got {pool!r}")
            block_size = pool.block_size
        self._keeps_more_than_pages = "minimax_m3_sparse" in layer_types  # the keys of its indexer
        self.storage = PagedStorage(
            len(layer_types), block_size, max_cache_len, sparse, pool, cache_dtype
        )
        super().__init__(layers=self._make_layers(layer_types))

    def _make_layers(self, layer_types: list[str]) -> list[PagedLayer]:
        return [
            PagedLayer(self.storage, index, kind in _SLIDING)
            for index, kind in enumerate(layer_types)
        ]

    @property
    def pages(self) -> PagedKVCache:
        """The paged cache, whose rows are those of the batch without their left padding."""
        return self.storage.pages

    def register_prefix(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> int:
        """Make the prompts that the rows hold findable by :meth:`match_prefix`, in whole blocks.

        In any cache on the same pool, and in this one after :meth:`reset`. The blocks outlive the
        rows until the pool needs them.

        Args:
            input_ids: ``(B, L)``, what the rows hold from their first column on.
            attention_mask: ``(B, L)``, zero on left padding. Default: no padding.

        Returns:
            How many tokens of the row that has the fewest can be found now.

        Raises:
            ValueError: on another number of rows, more tokens than a row holds, or padding that is
                not at the left; for a model whose cache keeps more than keys and values
                (MiniMax M3).
        """
        tokens, _ = self._prompts(input_ids, attention_mask)
        if len(tokens) != self.storage.rows:
            raise ValueError(
                f"input_ids: expected {max(0, self.storage.rows)} rows, as the cache has, got "
                f"{len(tokens)}"
            )
        return self.storage.register_prefix(tokens)

    def match_prefix(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> int:
        """Let an empty cache begin with the blocks that are known for these prompts.

        ``model.generate`` with the same ``input_ids`` then runs the other columns only; the last
        one is always left to it (two with :class:`BlockSparse`). For beam search,
        :meth:`batch_repeat_interleave` follows.

        Args:
            input_ids: ``(B, L)``.
            attention_mask: ``(B, L)``, zero on left padding. Default: no padding.

        Returns:
            How many columns the cache covers now; rows go on together, so the row that is known
            the least decides.

        Raises:
            ValueError: if the cache holds something, on padding that is not at the left, and for a
                model whose cache keeps more than keys and values (MiniMax M3).

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from torch_winnow.integrations.transformers import WinnowCache, register
            >>> register()
            >>> config = LlamaConfig(
            ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            ...     num_attention_heads=2, attn_implementation="winnow", eos_token_id=None,
            ... )
            >>> model = LlamaForCausalLM(config).eval()
            >>> prompt = torch.arange(20)[None]
            >>> cache = WinnowCache(config, block_size=8)
            >>> first = model.generate(prompt, past_key_values=cache, max_new_tokens=4)
            >>> cache.register_prefix(prompt)
            16
            >>> cache.reset()
            >>> cache.match_prefix(prompt)
            16
            >>> again = model.generate(prompt, past_key_values=cache, max_new_tokens=4)
            >>> torch.equal(first, again)
            True
        """
        tokens, padding = self._prompts(input_ids, attention_mask)
        # A single column would be a decode step: with BlockSparse, no longer part of the prompt.
        left = 1 if self.storage.sparse is None else 2
        return self.storage.match_prefix([row[:-left] for row in tokens], padding)

    def _prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[list[list[int]], list[int]]:
        """The tokens of each row, and the columns of padding to their left."""
        if self._keeps_more_than_pages:
            raise ValueError(
                "WinnowCache: prefixes are keys and values in pages, and this model's cache keeps "
                "the keys of its indexer too"
            )
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids: expected (B, L) integers, got {tuple(input_ids.shape)} of "
                f"{input_ids.dtype}"
            )
        if attention_mask is None:
            return input_ids.tolist(), [0] * len(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected {tuple(input_ids.shape)} as input_ids, got "
                f"{tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError("attention_mask: expected padding at the left only, got it elsewhere")
        padding = (~mask).sum(1).tolist()
        rows = input_ids.tolist()
        return [row[pad:] for row, pad in zip(rows, padding, strict=True)], padding

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``r`` continues what was row ``beam_idx[r]``: beam search, particles."""
        self._take("beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in their order."""
        self._take("indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; the copies share its blocks."""
        rows = torch.arange(max(0, self.storage.rows))
        self._take("repeats", rows.repeat_interleave(integer("repeats", repeats)))

    def _take(self, argument: str, rows: Tensor) -> None:
        listed = integers(argument, rows)
        self.storage.take(listed)
        for layer in self.layers:
            if layer.indexer_keys is not None:
                layer.indexer_keys = layer.indexer_keys[listed]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns.

        A positive number is the length to keep, as transformers still allows.
        """
        count = integer("tokens_to_remove", tokens_to_remove)
        columns = max(self.storage.columns)
        columns = count if count > 0 else max(0, columns + count)
        self.storage.crop(columns)
        for layer in self.layers:
            if layer.indexer_keys is not None:
                layer.indexer_keys = layer.indexer_keys[..., :columns, :]

    def reset(self) -> None:
        """Forget everything; the pool stays, and the next batch may have another size."""
        self.storage.reset()
        for layer in self.layers:
            layer.indexer_keys = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WinnowCache:
        twin = WinnowCache.__new__(WinnowCache)
        twin.__dict__.update(self.__dict__)
        twin.storage = self.storage.fork()
        twin.layers = []
        for layer in self.layers:
            copy = PagedLayer(twin.storage, layer.index, layer.is_sliding)
            copy.indexer_keys = layer.indexer_keys  # never written in place
            twin.layers.append(copy)
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        seen = max(self.storage.columns)
        return f"WinnowCache({len(self.layers)} layers, {self.storage.rows} rows, {seen} columns)"
