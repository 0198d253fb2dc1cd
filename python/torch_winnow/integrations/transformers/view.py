"""What ``update`` returns: the keys or values of a layer, dense for whoever asks, else in pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow._slow_path import warn_slow

if TYPE_CHECKING:
    from torch_winnow.integrations.transformers.storage import PagedStorage


class PagedStates(Tensor):
    """Keys or values of one layer, ``(B, Hkv, N, D)``, that have not left their pages.

    Attention ``"winnow"`` reads the pages. Any other operator (SDPA, a model that transforms its
    keys once more) gathers them into a dense tensor first, so nothing can mistake one for the
    other. Valid until the cache changes.
    """

    source: PagedStorage
    layer: int
    part: int  # 0: keys, 1: values
    stamp: tuple[int, int]
    in_step: bool  # handed to the attention of a layer, not looked at from outside

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(storage: PagedStorage, layer: int, part: int, in_step: bool = False) -> PagedStates:
        """The view of what layer ``layer`` has stored by now."""
        pages = storage.pool._layers[layer][part]
        shape = (storage.rows, pages.shape[1], storage.columns[layer], pages.shape[3])
        view: PagedStates = Tensor._make_wrapper_subclass(
            PagedStates, shape, dtype=storage.dtype, device=pages.device
        )
        view.source, view.layer, view.part = storage, layer, part
        view.stamp, view.in_step = storage.stamp(layer), in_step
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(PagedStates, PagedStates.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def check(self) -> None:
        """Raise if the cache went on since."""
        if self.stamp != self.source.stamp(self.layer):
            raise RuntimeError(
                f"WinnowCache: keys or values of layer {self.layer} are read after the cache "
                "changed; read them within the step that returned them, or clone() them"
            )

    def dense(self) -> Tensor:
        """A dense copy, for operators that know nothing of pages."""
        self.check()
        if self.source.dropped is not None:
            raise RuntimeError(
                "WinnowCache: left padding was not stored, because the prompt ran with attention "
                "'winnow'; go on with attention 'winnow', or run the prompt with the other "
                "implementation as well"
            )
        if self.in_step:
            warn_slow(
                "pages read by another attention",
                "WinnowCache: the model's attention is not 'winnow', so every layer copies its "
                "keys and values out of the pages at every step. Call "
                "model.set_attn_implementation('winnow'), or use DynamicCache with this attention",
            )
        return self.source.gather(self.layer, self.part)
