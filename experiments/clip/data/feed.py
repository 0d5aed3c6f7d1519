"""The blocks of a rank's coming batches, fetched into local copies before they are needed, once for all its workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.utils.data import get_worker_info

from ..io.copies import Copy, LocalCopies
from ..io.storage import is_remote, merged
from ..io.workers import AHEAD
from .lanes import Block, Lanes
from .order import RankPart
from .reader import Reader, Rows

# Bytes between members that are read along with them. Sending another request takes longer.
_GAP = 2**20


class BlockFeed:
    """Fetches the blocks of a rank's part of each batch; every worker a share of those to come, and what it lacks.

    Parameters
    ----------
    part : RankPart
        With an order of the kind `Lanes`.
    are_whole : bool
        Whether a shard is copied as a whole, whatever part of it a block is.
    """

    def __init__(self, part: RankPart, reader: Reader, copies: LocalCopies, are_whole: bool) -> None:
        assert isinstance(part.order, Lanes)
        self._order, self._part, self._reader, self._copies = part.order, part, reader, copies
        self._are_whole = are_whole
        self._begun = (-1, -1)
        self._rows: dict[Block, Rows] = {}
        self._remote: dict[Block, str] = {}

    def ready(self, epoch: int, step: int) -> list[Rows]:
        """Wait until the blocks of a step are there, begin to fetch those of later steps, and return the former's rows.

        Raises
        ------
        UserError
            If one cannot be read, or not be written.
        """
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._forget(epoch, step, number, count)
        now = list(self._blocks(epoch, [step]))
        # Others fetch their shares of these meanwhile.
        self._begin(sorted(now, key=lambda block: not _is_of(block, number, count)))
        self._begin(
            block for block in self._blocks(epoch, self._ahead(epoch, step, count)) if _is_of(block, number, count)
        )
        self._copies.use([self._remote[block] for block in now if block in self._remote])
        return [self._rows[block] for block in now]

    def _blocks(self, epoch: int, steps: Iterable[int]) -> Iterator[Block]:
        for step in steps:
            yield from self._order.blocks(epoch, *self._part.positions(step))

    def _ahead(self, epoch: int, step: int, workers: int) -> range:
        """Return the steps whose blocks are fetched from now on: those that workers will begin, and half a group."""
        last = min(self._part.steps, step + 1 + max(AHEAD * workers, self._order.group_steps // 2))
        begun = self._begun[1] if self._begun[0] == epoch and step <= self._begun[1] < last else step
        self._begun = epoch, last - 1
        return range(begun + 1, last)

    def _begin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if block in self._rows:
                continue
            rows = self._rows[block] = self._reader.rows(block.first, block.stop)
            path, members = self._reader.places(rows)
            if is_remote(path) and members:
                self._remote[block] = name = f"{block.epoch}-{block.lane}-{block.number}"
                ranges = () if self._are_whole else tuple(merged(members, _GAP))
                self._copies.begin([Copy(name, path, ranges)])

    def _forget(self, epoch: int, step: int, number: int, count: int) -> None:
        """Drop what no step from this one on needs, and delete of it what no worker is still reading."""
        finished = step - AHEAD * count
        for block in [each for each in self._rows if each.epoch != epoch or each.until < finished]:
            del self._rows[block]
            if (name := self._remote.pop(block, None)) is None:
                continue
            self._copies.forget([name])
            if _is_of(block, number, count):
                self._copies.remove([name])


def _is_of(block: Block, worker: int, workers: int) -> bool:
    """Whether a worker fetches a block in advance, and deletes it."""
    return (block.lane + block.number) % workers == worker
