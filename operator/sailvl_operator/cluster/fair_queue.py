"""Queue whose groups take turns, so that one namespace with many items does not delay the items of another.

Used by the work queue, the reader of progress, and the tasks of `fair_tasks.py`. Adding and taking an
item cost the same however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FairQueue(Generic[K, V]):
    """Items by key: first in, first out within a group, and one item of each group in turn.

    `group_by`: returns the group of a key.
    """

    def __init__(self, group_by: Callable[[K], Hashable]) -> None:
        self._group_by = group_by
        self._groups: OrderedDict[Hashable, OrderedDict[K, V]] = OrderedDict()  # in the order of their next turns
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, key: K) -> bool:
        return key in self.get_group(key)

    def get_group(self, key: K) -> Mapping[K, V]:
        """Return the items of a key's group, oldest first."""
        return self._groups.get(self._group_by(key), {})

    def list_groups(self) -> list[Mapping[K, V]]:
        """Return the items of each group, oldest first."""
        return list(self._groups.values())

    def heads(self) -> Iterator[V]:
        """Yield the oldest item of each group."""
        for items in self._groups.values():
            yield next(iter(items.values()))

    def add(self, key: K, item: V) -> None:
        """Add an item at the end of its group; an item that has the key already stays as it is."""
        items = self._groups.setdefault(self._group_by(key), OrderedDict())
        if key not in items:
            items[key] = item
            self._length += 1

    def pop(self) -> tuple[K, V]:
        """Remove and return the oldest item of the group whose turn it is. Raises KeyError if the queue is empty."""
        found = self.pop_where(lambda _: True)
        if found is None:
            raise KeyError("the queue is empty")
        return found

    def pop_where(self, may_take: Callable[[Any], bool]) -> tuple[K, V] | None:
        """Remove and return the oldest item of the first group, by turn, from which `may_take` allows one.

        Return None if there is none. Groups that are passed over keep their turn.
        """
        for group, items in self._groups.items():
            if not may_take(group):
                continue
            found = items.popitem(last=False)
            self._length -= 1
            if items:
                self._groups.move_to_end(group)
            else:
                del self._groups[group]
            return found
        return None

    def remove(self, key: K) -> V | None:
        """Remove an item and return it; None if there is none."""
        group = self._group_by(key)
        items = self._groups.get(group)
        if items is None or key not in items:
            return None
        self._length -= 1
        found = items.pop(key)
        if not items:
            del self._groups[group]
        return found

    def drop_oldest(self, key: K) -> None:
        """Remove the oldest item of a key's group, which may not be empty."""
        self.remove(next(iter(self._groups[self._group_by(key)])))

    def drop_oldest_of_largest_group(self) -> None:
        """Remove the oldest item of the largest group, so that small groups lose nothing when the queue is full."""
        largest = max(self._groups.values(), key=len)
        self.remove(next(iter(largest)))


def divide_fairly(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Return the share of each namespace in the capacity (max-min fairness): its demand if that is at most an equal
    share, else an equal share of what the modest ones leave."""
    shares: dict[str, float] = {}
    for name in sorted(demands, key=lambda name: demands[name]):
        share = min(demands[name], capacity / (len(demands) - len(shares)))
        shares[name] = share
        capacity -= share
    return shares
