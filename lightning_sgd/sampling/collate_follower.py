"""Follow the samples of a batch through the ``collate_fn`` of a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_sgd.sampling.row_values import Matches, matches_by_value, resolved, value_leaves

Candidates: TypeAlias = int
"""Items that something may come from: bit k is set for item k. Two draws of a sample may share its tensors."""

_JOINING = frozenset({"stack", "cat", "concat", "concatenate", "vstack", "hstack", "pad_sequence"})
_STACKING = frozenset({"stack", "vstack", "pad_sequence"})
_NAMES_BY_ELEMENT = """
to type type_as float double half bfloat16 int long short byte bool cpu cuda contiguous clone detach requires_grad
pin_memory share_memory add sub mul div truediv true_divide floordiv floor_divide remainder mod pow neg abs sqrt exp log
clamp clip round floor ceil iadd isub imul itruediv radd rsub rmul rtruediv where masked_fill lerp nan_to_num eq ne lt
le gt ge invert
"""
_BY_ELEMENT = frozenset(_NAMES_BY_ELEMENT.split())
"""Operations that leave every element where it is, without the underscores of their in-place forms."""
_NAMES_MOVING = """
roll flip flipud permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze index_select narrow
"""
_MOVING = frozenset(_NAMES_MOVING.split())
"""Operations that move rows as they move a column of row numbers."""
_RESHAPING = frozenset({"view", "reshape", "flatten"})
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
_MAX_DEPTH, _MAX_PARTS = 8, 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Which items a tensor comes from.

    Attributes:
        rows: Candidates of each row or piece along ``dim``; of the whole tensor, where that is ``None``. 0 is unknown.
        dim: Dimension of the rows.
        merges: Whether elements were computed from several items.
    """

    rows: tuple[Candidates, ...]
    dim: int | None = None
    merges: bool = False


_MERGED = Origin((), merges=True)


class CollateFollower(TorchFunctionMode):
    """Follow tensors and objects of items by their identity while the mode is on.

    Functions of torch that are called meanwhile pass on where their arguments come from: a tensor computed from those
    of one item belongs to it, and joining such tensors makes rows. What goes through other libraries is compared by
    value afterwards.

    Args:
        items: What the data set returned, at least one.
    """

    def __init__(self, items: list[Any]) -> None:
        super().__init__()
        self.num_items = len(items)
        self.merges = False
        # The objects themselves are kept as well, because identities are only unique among living ones.
        self._origins: dict[int, tuple[Any, Origin]] = {}
        # A collate may take its items apart.
        self._items = [_shallow(item) for item in items]
        origins = self._origins
        for position, item in enumerate(items):
            own = Origin((1 << position,))
            for each in _parts(item):
                known = origins.get(id(each))
                if known is None:
                    origins[id(each)] = each, own
                else:
                    origins[id(each)] = each, Origin((known[1].rows[0] | 1 << position,))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function as it is, and note where its result comes from."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__setitem__":
            self._assign(*args)
        elif isinstance(result, Tensor):
            self._note(result, self._origin_of_result(func, name, args, kwargs, result))
        elif isinstance(result, (tuple, list)) and all(isinstance(each, Tensor) for each in result):
            origin = _common(self._known(args, kwargs))
            for each in result:
                self._note(each, origin)
        return result

    def order_of(self, batch: Any) -> list[int] | None:
        """Find the position of the item of each row; ``None`` if that cannot be told."""
        evidence = list(self._evidence(batch))
        if self.merges:
            return None
        lists = [
            rows if len(rows) <= self.num_items else tuple(dict.fromkeys(rows)) for rows in evidence
        ]
        if len({len(rows) for rows in lists}) > 1:
            # Pieces of several sizes, such as the boxes of each image; of images without a box there is no piece.
            lists = [tuple(dict.fromkeys(rows)) for rows in lists]
            longest = max(map(len, lists))
            lists = [rows for rows in lists if len(rows) == longest]
        found = [_intersection(rows) for rows in zip(*lists, strict=True)] if lists else None
        if found is not None and 0 in found:
            self.merges = True
            return None
        if found is not None and all(rows & (rows - 1) == 0 for rows in found):
            return [rows.bit_length() - 1 for rows in found]
        return self._order_by_value(batch, found)

    def _order_by_value(self, batch: Any, found: Sequence[Candidates] | None) -> list[int] | None:
        # Items that are None, as of broken files, are what collates leave out.
        present = [position for position, item in enumerate(self._items) if item is not None]
        if not present:
            return None
        items = [self._items[position] for position in present]
        values = [dict(value_leaves(item)) or {(): item} for item in items]
        matches: Matches | None = None
        if found is not None:
            rows = [[candidates >> each & 1 for each in present] for candidates in found]
            matches = np.array(rows, dtype=bool)
        by_value = matches_by_value(values, batch, None if matches is None else len(matches))
        if matches is None:
            matches = by_value
        elif by_value is not None and (matches & by_value).any(1).all():
            matches = matches & by_value
        order = None if matches is None else resolved(matches, values)
        return None if order is None else [present[each] for each in order]

    # While the collate runs.

    def _origin(self, value: Any) -> Origin | None:
        known = self._origins.get(id(value))
        return None if known is None else known[1]

    def _note(self, result: Any, origin: Origin | None) -> None:
        if origin is not None:
            self._origins[id(result)] = result, origin
        else:
            self._origins.pop(
                id(result), None
            )  # changed in place by something that is not followed

    def _known(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Origin]:
        found = []
        for each in (*args, *kwargs.values()):
            origin = None if type(each) in _PLAIN else self._origin(each)
            if origin is not None:
                found.append(origin)
            elif isinstance(each, (list, tuple)):
                found += [origin for part in each if (origin := self._tensor_origin(part))]
        return found

    def _tensor_origin(self, value: Any) -> Origin | None:
        return self._origin(value) if isinstance(value, Tensor) else None

    def _origin_of_result(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> Origin | None:
        if name in _JOINING:
            parts = args[0] if args else kwargs.get("tensors", kwargs.get("sequences"))
            if isinstance(parts, (list, tuple)):
                return self._joined(parts, name, args, kwargs, result)
        known = self._known(args, kwargs)
        if not known:
            return None
        common = _common(known)
        if common is not None:
            return common
        plain = name.strip("_")
        if any(origin.merges for origin in known):
            return _MERGED if plain in _BY_ELEMENT else None
        if plain in _BY_ELEMENT:
            return _by_element(known, result)
        first = self._tensor_origin(args[0]) if args else None
        if first is None or first.dim is None or len(known) > 1:
            return None
        if name == "__getitem__":
            return _indexed(first, args[0], args[1])
        if plain in _RESHAPING:
            keeps = first.dim == 0 and result.ndim > 0 and len(result) == len(args[0])
            return first if keeps else None
        return _moved(func, first, args, kwargs) if plain in _MOVING else None

    def _joined(
        self,
        parts: Sequence[Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> Origin | None:
        origins = [self._origin(part) for part in parts]
        known = [origin for origin in origins if origin is not None]
        if not known:
            return None
        if any(origin.merges for origin in known):
            return _MERGED
        dim = _dim_of(name, args, kwargs) % result.ndim
        has_rows = [origin.dim is not None and len(set(origin.rows)) > 1 for origin in known]
        if all(has_rows) and any(origin.dim != dim for origin in known):  # features side by side
            return _by_element(known, result) if name not in _STACKING else None
        if any(has_rows) and name in _STACKING:
            return None
        rows: list[Candidates] = []
        for origin in origins:
            if origin is None:
                rows.append(0)
            else:
                is_whole = origin.dim is None or len(set(origin.rows)) == 1
                rows += origin.rows[:1] if is_whole else origin.rows
        return Origin(tuple(rows), dim)

    def _assign(self, target: Any, index: Any, value: Any) -> None:
        """Note ``target[index] = value``, as in ``for i, x in enumerate(items): padded[i, : len(x)] = x``."""
        value_origin = self._tensor_origin(value)
        origin = self._tensor_origin(target)
        if value_origin is None or not target.ndim:
            return
        if value_origin.merges or (origin is not None and origin.merges):
            self._note(target, _MERGED)
            return
        row = index[0] if isinstance(index, tuple) and index else index
        if origin is not None and origin.dim != 0:
            self._note(target, _common([origin, value_origin]))
        elif value_origin.dim is None and isinstance(row, int):
            rows = list(origin.rows) if origin is not None else [0] * len(target)
            if len(rows) == len(target):
                both = rows[row] & value_origin.rows[0] if rows[row] else value_origin.rows[0]
                rows[row] = both
                self._note(target, Origin(tuple(rows), 0) if both else _MERGED)
        elif origin is not None:
            part = _indexed(origin, target, index)
            agree = part is not None and part.dim == value_origin.dim and _agree(part, value_origin)
            known = part is not None and value_origin.dim is not None
            self._note(target, origin if agree else _MERGED if known else None)

    # Afterwards.

    def _evidence(self, value: Any, depth: int = 0) -> Iterator[tuple[Candidates, ...]]:
        """Iterate over the rows of everything in the batch whose rows are known."""
        if type(value) in _PLAIN or depth > _MAX_DEPTH:
            return
        if isinstance(value, Tensor):
            origin = self._origin(value)
            if origin is not None and origin.merges:
                self.merges = True
            elif origin is not None and origin.dim is not None and all(origin.rows):
                yield origin.rows
            return
        if isinstance(value, (list, tuple)) and value:
            owners = [self._owner(each) for each in value]
            if all(owners):
                yield tuple(owners[:1] if len(set(owners)) == 1 else owners)
                return
        for each in _children(value):
            yield from self._evidence(each, depth + 1)

    def _owner(self, value: Any, depth: int = 0) -> Candidates:
        """Return the items to which a part of the batch may belong as a whole; 0 for none."""
        if type(value) in _PLAIN or depth > _MAX_DEPTH:
            return 0
        origin = self._origin(value)
        if origin is not None:
            return 0 if origin.dim is not None or origin.merges else origin.rows[0]
        if isinstance(value, Tensor):
            return 0
        owners = [owner for each in _children(value) if (owner := self._owner(each, depth + 1))]
        return _intersection(owners) if owners else 0


def _shallow(item: Any) -> Any:
    if isinstance(item, Mapping):
        return dict(item)
    return list(item) if type(item) is list else item


def _parts(item: Any) -> list[Any]:
    """Return an item and what is in it, up to a limit, where its identity says where it comes from."""
    found: list[Any] = []
    level = [item]
    for _ in range(_MAX_DEPTH):
        level = [each for each in level if type(each) not in _PLAIN]
        found += level
        if len(found) > _MAX_PARTS:
            return found[:_MAX_PARTS]
        containers = [
            each for each in level if type(each) is not Tensor and not _is_list_of_plain(each)
        ]
        if not containers:
            return found
        level = [part for each in containers for part in _children(each)]
    return found


def _is_list_of_plain(value: Any) -> bool:
    return type(value) is list and (not value or type(value[0]) in _PLAIN)


def _children(value: Any) -> list[Any]:
    if type(value) is tuple:  # the most frequent one
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic, type)) or callable(value):
        return []
    content = dict(getattr(value, "__dict__", {}))
    content |= {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
    return list(content.values())


def _intersection(candidates: Sequence[Candidates]) -> Candidates:
    common = -1
    for each in candidates:
        common &= each
    return common


def _common(known: Sequence[Origin]) -> Origin | None:
    """Return the origin of what is computed from one item alone."""
    if not known or any(origin.dim is not None or origin.merges for origin in known):
        return None
    candidates = _intersection([origin.rows[0] for origin in known])
    return Origin((candidates,)) if candidates else None


def _agree(one: Origin, other: Origin) -> bool:
    return len(one.rows) == len(other.rows) and all(
        map(_intersection, zip(one.rows, other.rows, strict=True))
    )


def _by_element(known: Sequence[Origin], result: Tensor) -> Origin | None:
    if all(origin.dim is None for origin in known):
        return _MERGED  # of several items, or they had one in common
    first = next(origin for origin in known if origin.dim is not None)
    if any(origin.dim != first.dim or len(origin.rows) != len(first.rows) for origin in known):
        return None
    assert first.dim is not None
    if result.ndim <= first.dim or result.shape[first.dim] != len(first.rows):
        return first if len(known) == 1 else None
    rows = tuple(_intersection(row) for row in zip(*(each.rows for each in known), strict=True))
    unknown = any(0 in origin.rows for origin in known)
    if all(rows):
        return Origin(rows, first.dim)
    return None if unknown else _MERGED


def _indexed(origin: Origin, tensor: Tensor, index: Any) -> Origin | None:
    """Return the origin of ``tensor[index]``, where the index takes rows as a whole."""
    dim, indices = origin.dim, list(index) if isinstance(index, tuple) else [index]
    if any(each is Ellipsis for each in indices):
        at = next(number for number, each in enumerate(indices) if each is Ellipsis)
        indices[at : at + 1] = [slice(None)] * (tensor.ndim - len(indices) + 1)
    if (
        dim is None
        or tensor.shape[dim] != len(origin.rows)
        or any(each is None for each in indices)
    ):
        return None
    before, row, after = indices[:dim], indices[dim : dim + 1], indices[dim + 1 :]
    if not all(isinstance(each, slice) for each in before):
        return None
    if not all(isinstance(each, (slice, int)) for each in after):
        return None
    if not row:
        return origin
    if isinstance(row[0], bool):
        return None
    try:
        rows = torch.arange(len(origin.rows))[row[0]]
    except (IndexError, TypeError):
        return None
    taken = [origin.rows[each] for each in rows.flatten().tolist()]
    if rows.ndim == 0:
        return Origin((taken[0],)) if taken[0] else None
    return Origin(tuple(taken), dim) if rows.ndim == 1 else None


def _moved(
    func: Callable[..., Any], origin: Origin, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Origin | None:
    """Apply the function to a column of row numbers."""
    dim, num = origin.dim, len(origin.rows)
    if dim is None or args[0].shape[dim] != num or num < 2:
        return None
    column = torch.arange(num).view([num if each == dim else 1 for each in range(args[0].ndim)])
    try:
        moved = func(column, *args[1:], **kwargs)
    except (IndexError, RuntimeError):  # it moves along another dimension
        return None
    long = [each for each, size in enumerate(moved.shape) if size != 1]
    if len(long) != 1:
        return None
    return Origin(tuple(origin.rows[row] for row in moved.flatten().tolist()), long[0])


def _dim_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if name == "pad_sequence":
        batch_first = args[1] if len(args) > 1 else kwargs.get("batch_first", False)
        return 0 if batch_first else 1
    if name == "hstack":
        return 0
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return int(dim) if isinstance(dim, int) else 0
