"""Lists of what is kept, to compare the ledger with: pure state, of one size, whatever is in them.

Each is given what is asked for, in that order, and says each time whether it had it. What it had not it takes in, in
place of another once it is full: a connection has to be opened in any case.

- `belady`: none can find more, for it knows what will be asked for (L. A. Belady, "A study of replacement algorithms
  for a virtual-storage computer", IBM Systems Journal 5(2), 1966).
- `lru`: the least recently used goes.
- `two_queues`: 2Q in its full version, of the sizes that its authors advise (T. Johnson and D. Shasha, "2Q: a low
  overhead high performance buffer management replacement algorithm", VLDB 1994).
- `s3_fifo`: S3-FIFO, likewise (J. Yang, Y. Zhang, Z. Qiu, Y. Yue and K. V. Rashmi, "FIFO queues are all you need for
  cache eviction", SOSP 2023).

The last two resist scans: what is asked for only once does not drive out what is asked for again and again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T", bound=Hashable)

Cache: TypeAlias = Callable[[Sequence[Hashable], int], Iterator[bool]]


class _Queue(Generic[T]):
    """An ordered set, the oldest first."""

    def __init__(self) -> None:
        self._items: OrderedDict[T, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def append(self, item: T) -> None:
        """Make it the newest, whether it is there or not."""
        self._items[item] = None
        self._items.move_to_end(item)

    def remove(self, item: T) -> bool:
        """Whether it was there."""
        found = item in self._items
        self._items.pop(item, None)
        return found

    def pop(self) -> T:
        """Take out the oldest."""
        return self._items.popitem(last=False)[0]


def belady(asked: Sequence[Hashable], size: int) -> Iterator[bool]:
    """Drop what will be asked for last."""
    next_use: dict[Hashable, int] = {}
    # By next use, the latest first, negative for the heap; some are over, or of what is gone.
    latest: list[tuple[int, Hashable]] = []
    for item, use in zip(asked, _next_uses(asked), strict=True):
        hit = item in next_use
        while not hit and len(next_use) == size:
            negative, other = heappop(latest)
            if next_use.get(other) == -negative:
                del next_use[other]
        next_use[item] = use
        heappush(latest, (-use, item))
        yield hit


def _next_uses(asked: Sequence[Hashable]) -> list[int]:
    """When each access's item is asked for again: the number of that access, or past the end."""
    following: dict[Hashable, int] = {}
    uses = []
    for number in reversed(range(len(asked))):
        # No two alike past the end: the heap would go on to compare the items.
        uses.append(following.get(asked[number], len(asked) + number))
        following[asked[number]] = number
    return uses[::-1]


def lru(asked: Sequence[Hashable], size: int) -> Iterator[bool]:
    """Drop what was asked for longest ago."""
    kept: _Queue[Hashable] = _Queue()
    for item in asked:
        hit = item in kept
        if not hit and len(kept) == size:
            kept.pop()
        kept.append(item)
        yield hit


def two_queues(asked: Sequence[Hashable], size: int) -> Iterator[bool]:
    """Drop the oldest of what is new, in a queue; only what is asked for again after that gets into an LRU list."""
    return map(_TwoQueues[Hashable](size).ask, asked)


class _TwoQueues(Generic[T]):
    def __init__(self, size: int) -> None:
        self._size = size
        self._max_new = max(1, size // 4)
        self._max_gone = max(1, size // 2)
        self._new: _Queue[T] = _Queue()
        self._gone: _Queue[T] = _Queue()
        self._often: _Queue[T] = _Queue()

    def ask(self, item: T) -> bool:
        if item in self._often:
            self._often.append(item)
            return True
        if item in self._new:
            return True
        returns = self._gone.remove(item)
        if len(self._new) + len(self._often) == self._size:
            self._make_room()
        (self._often if returns else self._new).append(item)
        return False

    def _make_room(self) -> None:
        if self._often and len(self._new) <= self._max_new:
            self._often.pop()
            return
        self._gone.append(self._new.pop())
        if len(self._gone) > self._max_gone:
            self._gone.pop()


def s3_fifo(asked: Sequence[Hashable], size: int) -> Iterator[bool]:
    """Drop what is not used while it goes through a small queue, or once round in the main one."""
    return map(_S3Fifo[Hashable](size).ask, asked)


class _S3Fifo(Generic[T]):
    _MAX_USES = 3

    def __init__(self, size: int) -> None:
        self._size = size
        self._min_small = size / 10
        self._max_gone = max(1, size * 9 // 10)
        self._small: _Queue[T] = _Queue()
        self._main: _Queue[T] = _Queue()
        self._gone: _Queue[T] = _Queue()
        self._uses: Counter[T] = Counter()

    def ask(self, item: T) -> bool:
        if item in self._small or item in self._main:
            self._uses[item] = min(self._uses[item] + 1, self._MAX_USES)
            return True
        while len(self._small) + len(self._main) == self._size:
            self._make_room()
        (self._main if self._gone.remove(item) else self._small).append(item)
        return False

    def _make_room(self) -> None:
        """Let the oldest of a queue go, or move on if it was used; so not every call makes room."""
        if len(self._small) >= self._min_small:
            self._leave_small(self._small.pop())
        else:
            self._leave_main(self._main.pop())

    def _leave_small(self, item: T) -> None:
        if self._uses.pop(item, 0) > 1:
            self._main.append(item)
            return
        self._gone.append(item)
        if len(self._gone) > self._max_gone:
            self._gone.pop()

    def _leave_main(self, item: T) -> None:
        if self._uses[item]:
            self._uses[item] -= 1
            self._main.append(item)
        else:
            del self._uses[item]
