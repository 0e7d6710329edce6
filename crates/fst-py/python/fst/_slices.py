"""What to read for an index, and what to take of that. Pure."""

import operator

_FULL = slice(None)

#: Positions of the dimensions outside of the two innermost that are cut: each is a range of the file of its own.
_SCATTERED = 1 << 16


def plan(shape, index):
    """Returns `(cuts, rest)`: read positions `range(start, end, step)` of dimensions, as `(dim, start, end, step)`,
    and index the result with `rest`, which takes nothing away but single dimensions and, of the last one, positions
    between.

    Returns None for an index that only a tensor can understand, or refuse.
    """
    items = index if isinstance(index, tuple) else (index,)
    taken, ellipsis = 0, None
    for at, item in enumerate(items):
        if item is Ellipsis:
            if ellipsis is not None:
                return None
            ellipsis = at
        elif item is not None:
            taken += 1
    free = len(shape) - taken
    if free < 0:
        return None
    at = len(items) if ellipsis is None else ellipsis
    after = items[at + 1 :] if ellipsis is not None else ()
    items = [*items[:at], *[_FULL] * free, *after]
    cuts, dim = [], 0
    for at, item in enumerate(items):
        if item is None:
            continue
        bounds = _bounds(item, shape[dim], dim == len(shape) - 1)
        if bounds is None:
            return None
        *cut, items[at] = bounds
        if cut != [0, shape[dim], 1]:
            cuts.append((dim, *cut))
        dim += 1
    outer = 1
    for dim, start, end, step in cuts[:-2]:
        outer *= max(1, len(range(start, end, step)))
    if outer > _SCATTERED:
        return None
    return cuts, tuple(items)


def _bounds(item, size, last):
    """First position, end and step of what to read for an item, and the item of that. Single elements of the last
    dimension are read with those between them."""
    if isinstance(item, slice):
        try:
            positions = range(*item.indices(size))
        except (TypeError, ValueError):
            return None
        if not positions:
            return 0, 0, 1, _FULL
        low, high = min(positions[0], positions[-1]), max(positions[0], positions[-1])
        step = 1 if last else abs(positions.step)
        rest = positions.step if last or positions.step < 0 else 1
        return low, high + 1, step, _FULL if rest == 1 else slice(None, None, rest if last else -1)
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        return None
    try:
        position = operator.index(item)
    except TypeError:
        return None
    if position < 0:
        position += size
    if not 0 <= position < size:
        return None
    return position, position + 1, 1, 0


def is_whole(index):
    """Whether an index takes everything and adds no dimension."""
    return all(item == _FULL for item in index if item is not None) and None not in index
