"""Compare the rows of a batch with the samples that they were made of, by value."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Path: TypeAlias = tuple[Any, ...]
Matches: TypeAlias = NDArray[np.bool_]
"""Whether a row [m] may come from an item [n], of shape (m, n)."""

_NUM_COMPARED = 32
"""Elements of each row that are compared; all rows of a large image take longer than the collate itself."""
_MAX_LEAVES = 8
_MAX_DEPTH = 4


def value_leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Iterate over tensors, arrays, text, numbers and lists of numbers within mappings, lists and tuples."""
    if _is_number(value) or isinstance(value, (str, Tensor, np.ndarray)):
        yield path, value
    elif isinstance(value, Mapping) and len(path) < _MAX_DEPTH:
        for key, part in value.items():
            yield from value_leaves(part, (*path, key))
    elif isinstance(value, (list, tuple)) and len(path) < _MAX_DEPTH:
        if value and isinstance(value, list) and all(map(_is_number, value)):
            yield path, value
            return
        for number, part in enumerate(value[: 2 * _MAX_LEAVES]):
            yield from value_leaves(part, (*path, number))


def matches_by_value(
    items: Sequence[Mapping[Path, Any]], batch: Any, num_rows: int | None = None
) -> Matches | None:
    """Compare the rows of a batch with the items by value; ``None`` if that tells nothing.

    A vector of numbers identifies a sample. A single number or text, such as a label, only confirms the order of the
    items, or tells samples apart where it stands in the batch under the name that it has in the item.

    Args:
        items: What :func:`value_leaves` found in each of them.
        batch: Made of them.
        num_rows: Number of rows, if that is known.
    """
    shared = [path for path in items[0] if all(path in item for item in items)][:_MAX_LEAVES]
    columns = list(islice(_columns(batch), 2 * _MAX_LEAVES))
    sizes = {len(column) for _, column in columns if len(column) <= len(items)}
    for size in sorted(sizes, reverse=True) if num_rows is None else [num_rows]:
        of_size = [(path, column) for path, column in columns if len(column) == size]
        matches = _matches_of_size(items, shared, of_size, size)
        if matches is not None:
            return matches
    return None


def resolved(matches: Matches, items: Sequence[Mapping[Path, Any]]) -> list[int] | None:
    """Return the item of each row, if only one order is possible, or if the rows may be in the order of the items."""
    num_rows, num_items = matches.shape
    if num_rows == num_items and matches.diagonal().all():
        return list(range(num_rows))
    order: list[int] = []
    for row in matches:
        candidates = np.flatnonzero(row).tolist()
        if not all(_are_same(items[candidates[0]], items[each]) for each in candidates[1:]):
            return None
        unused = [each for each in candidates if each not in order]
        order.append((unused or candidates)[0])
    return order


def _matches_of_size(
    items: Sequence[Mapping[Path, Any]],
    shared: Sequence[Path],
    columns: Sequence[tuple[Path, Any]],
    num_rows: int,
) -> Matches | None:
    found: Matches = np.ones((num_rows, len(items)), dtype=bool)
    singles: list[tuple[bool, Matches]] = []
    for where, column in columns:
        for path in shared:
            matches, is_single = _matches(column, [item[path] for item in items])
            if matches is None or not matches.any(1).all() or matches.all():
                continue
            if is_single:
                singles.append((path[-1:] == where[-1:], matches))
            elif (found & matches).any(1).all():
                found = found & matches
    for is_named, matches in singles:
        confirms = num_rows == len(items) and bool(matches.diagonal().all())
        if (confirms or is_named) and (found & matches).any(1).all():
            found = found & matches
    return None if found.all() else found


def _are_same(one: Mapping[Path, Any], other: Mapping[Path, Any]) -> bool:
    """Return whether two items are draws of the same sample, as far as their values tell."""
    if one.keys() != other.keys():
        return False
    for path, value in one.items():
        its = other[path]
        if value is its or (isinstance(value, str) and value == its):
            continue
        mine, others = _array(value), _array(its)
        if mine is None or others is None or not np.array_equal(mine, others):
            return False
    return True


def _columns(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Iterate over what may hold one entry for each row: tensors, arrays, and lists of text or numbers."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim:
            yield path, value
    elif isinstance(value, Mapping) and len(path) < _MAX_DEPTH:
        for key, part in value.items():
            yield from _columns(part, (*path, key))
    elif isinstance(value, (list, tuple)) and value and len(path) < _MAX_DEPTH:
        if all(_is_number(each) or isinstance(each, str) for each in value):
            yield path, value
            return
        for number, part in enumerate(value[: 2 * _MAX_LEAVES]):
            yield from _columns(part, (*path, number))
    elif hasattr(value, "__dict__") and not callable(value) and len(path) < _MAX_DEPTH:
        for key, part in vars(value).items():
            yield from _columns(part, (*path, key))


def _matches(column: Any, values: Sequence[Any]) -> tuple[Matches | None, bool]:
    """Compare each row with the value of each item; also whether the values are single numbers or texts."""
    first = values[0]
    if isinstance(first, str):
        if not isinstance(column, (list, tuple)) or not all(
            isinstance(each, str) for each in values
        ):
            return None, True
        return np.array([[row == value for value in values] for row in column], dtype=bool), True
    if isinstance(column, (list, tuple)) and any(isinstance(each, str) for each in column):
        return None, True
    rows = _array(column)
    arrays = [_array(value) for value in values]
    if rows is None or any(each is None for each in arrays):
        return None, True
    found = [each.reshape(-1) for each in arrays if each is not None]
    rows = rows.reshape(len(rows), -1)
    sizes = {len(each) for each in found}
    is_single = sizes == {1}
    width = rows.shape[1]
    if 0 in sizes or max(sizes) > width or (is_single and width != 1):
        return None, is_single
    if len(sizes) == 1 and width in sizes:
        at = np.linspace(0, width - 1, min(width, _NUM_COMPARED)).astype(int)
        return _equal(rows[:, at], np.stack([each[at] for each in found])), is_single
    num = min(*sizes, _NUM_COMPARED)  # padded, on the right or on the left
    right = _equal(rows[:, :num], np.stack([each[:num] for each in found]))
    left = _equal(rows[:, width - num :], np.stack([each[-num:] for each in found]))
    return (right if right.any(1).all() else left), is_single


def _equal(rows: NDArray[Any], values: NDArray[Any]) -> Matches:
    # In the precision of the batch, to which a collate may have converted.
    with np.errstate(invalid="ignore", over="ignore"):
        converted = np.nan_to_num(values.astype(rows.dtype)).astype(np.float64)
    known = np.nan_to_num(rows).astype(np.float64)
    result: Matches = (known[:, None] == converted[None]).all(2)
    return result


def _array(value: Any) -> NDArray[Any] | None:
    if isinstance(value, Tensor):
        if value.is_sparse or value.is_nested or value.is_quantized or value.device.type == "meta":
            return None
        plain = value.detach().cpu()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    if not isinstance(value, (list, np.ndarray)) and not _is_number(value):
        return None
    array = np.asarray(value)
    return array if array.dtype.kind in "biuf" else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Number, np.generic))
