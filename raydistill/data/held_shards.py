"""The shards that a worker's batches need, read ahead of them and held in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

HELD_BYTES = 256 << 20


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)


class HeldShards(Generic[S]):
    """Shards by their number, each read once by `load`, in one thread beside the training.

    Those that coming batches need are kept, and of the others those used last, up to HELD_BYTES.
    """

    def __init__(self, load: Callable[[int], S]) -> None:
        self._load = load
        self._held: OrderedDict[int, Future[S]] = OrderedDict()
        self._needed: frozenset[int] = frozenset()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shards")

    def __getitem__(self, number: int) -> S:
        self.read_ahead([number])
        self._held.move_to_end(number)
        shard = self._held[number].result()
        self._release(self._needed | {number})
        return shard

    @property
    def numbers(self) -> list[int]:
        """Of the shards that are held or being read, the one used last at the end."""
        return list(self._held)

    def need(self, numbers: Iterable[int]) -> None:
        """From now on the batches that come need these, and no others that were needed before."""
        self._needed = frozenset(numbers)

    def need_too(self, number: int) -> None:
        self._needed |= {number}

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """Starts reading shards in the background."""
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._reader.submit(self._load, number)

    def _release(self, keep: frozenset[int]) -> None:
        done = {n: f.result().nbytes for n, f in self._held.items() if f.done()}
        total = sum(done.values())
        for number in [n for n in done if n not in keep]:
            if total <= HELD_BYTES:
                return
            del self._held[number]
            total -= done[number]

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
