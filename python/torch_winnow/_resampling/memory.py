"""What memory views have in common: a gather in place writes where others may read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def _dimensions(view: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that step anywhere, the widest stride first."""
    pairs = zip(view.stride(), view.shape, strict=True)
    return sorted(((stride, size) for stride, size in pairs if size > 1), reverse=True)


def overlaps_itself(view: Tensor) -> bool:
    """Whether elements may share memory: a dimension steps by less than the narrower ones span."""
    if view.is_contiguous() or view.numel() == 0:
        return False
    span = 1
    for stride, size in reversed(_dimensions(view)):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def _extent(view: Tensor) -> tuple[int, int]:
    """The bytes of the storage from the first element's to the last one's."""
    first = view.storage_offset() * view.element_size()
    steps = sum(stride * (size - 1) for stride, size in _dimensions(view))
    return first, first + (steps + 1) * view.element_size()


def _box(view: Tensor, origin: int, strides: list[int]) -> list[tuple[int, int]] | None:
    """The range of coordinates along each stride, None where coordinates are not unique."""
    sizes = dict(_dimensions(view))
    rest = view.storage_offset() - origin
    box = []
    for stride in strides:
        start, rest = divmod(rest, stride)
        box.append((start, start + sizes.get(stride, 1)))
    farthest = rest
    for stride, (_, stop) in zip(reversed(strides), reversed(box), strict=True):
        if farthest >= stride:
            return None
        farthest += stride * (stop - 1)
    return [*box, (rest, rest + 1)]


def _disjoint(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage surely share nothing: slices of one tensor that do not meet.

    Neither may overlap itself. Their elements have unique coordinates along the strides of both, so
    two boxes that are apart in one coordinate have no element in common.
    """
    if a.element_size() != b.element_size():
        return False
    strides = sorted({stride for view in (a, b) for stride, _ in _dimensions(view)}, reverse=True)
    origin = min(a.storage_offset(), b.storage_offset())
    box, other = _box(a, origin, strides), _box(b, origin, strides)
    if box is None or other is None:
        return False
    return any(
        stop <= other_start or other_stop <= start
        for (start, stop), (other_start, other_stop) in zip(box, other, strict=True)
    )


def first_overlap(views: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two views that may share memory, or None. None of them may overlap itself."""
    by_storage: dict[int, list[Tensor]] = {}
    for view in views:
        if view.numel() > 0:
            by_storage.setdefault(view.untyped_storage().data_ptr(), []).append(view)
    for group in by_storage.values():
        if len(group) == 1:
            continue
        # Sorted by their first byte, a view can only meet those that have not ended before it.
        open_views: list[tuple[int, Tensor]] = []
        spans = sorted(((*_extent(view), at) for at, view in enumerate(group)))
        for first, end, at in spans:
            open_views = [(stop, view) for stop, view in open_views if stop > first]
            for _, view in open_views:
                if not _disjoint(view, group[at]):
                    return view, group[at]
            open_views.append((end, group[at]))
    return None
