"""The order of training: which tokens stand in which row of which step.

It is computed and not stored. Per source and epoch the documents stand in a random order and are dealt to as many lanes
as a step has rows of the source; in each lane they stand one behind the other, and are cut into rows where the context
ends. Which source a row is from is decided by what each is behind its share. All of it depends on the seed and the rows
before alone, and not on processes or micro-batches, so that a few counters in a checkpoint are enough to go on.
"""

import hashlib
import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from .prepared import Tokens
from .recipe import Recipe

_WORD = (1 << 64) - 1


class Shuffle:
    """A random permutation of range(size) in no memory: a Feistel network, applied until it lands inside."""

    ROUNDS = 4

    def __init__(self, size: int, key: str):
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of a half; both together cover the range
        digest = hashlib.sha256(key.encode()).digest()
        self.keys = [int.from_bytes(digest[8 * number : 8 * number + 8], "big") for number in range(self.ROUNDS)]

    def __call__(self, index: int) -> int:
        mask = (1 << self.half) - 1
        while True:
            left, right = index >> self.half, index & mask
            for key in self.keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            index = left << self.half | right
            if index < self.size:
                return index


def _mixed(word: int) -> int:
    """64 bits, each of which depends on all of `word` (the finalizer of MurmurHash3)."""
    word = (word ^ word >> 33) * 0xFF51AFD7ED558CCD & _WORD
    word = (word ^ word >> 33) * 0xC4CEB9FE1A85EC53 & _WORD
    return word ^ word >> 33


@dataclass(frozen=True)
class Place:
    """Where in its part of a source a lane goes on."""

    epoch: int = 0
    position: int = 0
    """Of the document among those of the lane in the epoch's order."""
    offset: int = 0
    """Tokens of that document that are behind it."""


class Stream:
    """The rows of one source, without end, from several lanes in turn.

    Of an epoch's order lane l of n has the documents l, l + n, l + 2n and so on. With one lane the rows of a step would
    be neighbours, often of one document.
    """

    def __init__(self, name: str, tokens: Tokens, seed: int, lanes: int = 1):
        self.name, self.tokens, self.seed = name, tokens, seed
        self.places = [Place()] * max(1, min(lanes, len(tokens)))
        self.rows = 0
        self._orders: dict[int, Shuffle] = {}

    def take(self, length: int, *, read: bool) -> np.ndarray | None:
        """`length` tokens and the one that follows them, with which the lane's next row begins; only if `read`."""
        lane = self.rows % len(self.places)
        parts: list[np.ndarray] = []
        left, place = length, self.places[lane]
        while left:
            count, place = self._step(lane, place, left, parts if read else None)
            left -= count
        self.places[lane] = place
        self.rows += 1
        if not read:
            return None
        self._step(lane, place, 1, parts)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> Shuffle:
        if epoch not in self._orders:
            # Lanes are in neighbouring epochs at most, for their parts are alike.
            self._orders = {number: order for number, order in self._orders.items() if number >= epoch - 2}
            self._orders[epoch] = Shuffle(len(self.tokens), f"{self.seed} {self.name} {epoch}")
        return self._orders[epoch]

    def _step(self, lane: int, place: Place, most: int, parts: list[np.ndarray] | None) -> tuple[int, Place]:
        """Reads up to `most` tokens of the document at `place`: their number, and the place behind them."""
        number = place.position * len(self.places) + lane
        document = self._order(place.epoch)(number)
        begin = self.tokens.start(document) + place.offset
        end = min(begin + most, int(self.tokens.ends[document]))
        if parts is not None:
            parts.append(self.tokens.ids[begin:end])
        if end < self.tokens.ends[document]:
            return end - begin, replace(place, offset=place.offset + end - begin)
        if number + len(self.places) < len(self.tokens):
            return end - begin, replace(place, position=place.position + 1, offset=0)
        return end - begin, Place(epoch=place.epoch + 1)


class Mixture:
    """The rows of all sources by their shares."""

    def __init__(self, recipe: Recipe, train: dict[str, Tokens]):
        self.length = recipe.context_length
        self.shares = {source.name: source.share for source in recipe.sources}
        self.streams = {
            name: Stream(name, train[name], recipe.seed, lanes=math.ceil(share * recipe.num_rows))
            for name, share in self.shares.items()
        }

    def next_rows(self, count: int, wanted: range | set[int]) -> np.ndarray:
        """Goes on by `count` rows; those whose number is in `wanted`, (rows, context_length + 1), int64."""
        rows = [
            row
            for number in range(count)
            if (row := self._behind().take(self.length, read=number in wanted)) is not None
        ]
        return np.stack(rows).astype(np.int64)

    def _behind(self) -> Stream:
        """The source that lacks most of its share of the rows up to the next; the first of several."""
        total = 1 + sum(stream.rows for stream in self.streams.values())
        return max(self.streams.values(), key=lambda stream: self.shares[stream.name] * total - stream.rows)

    def epochs(self) -> dict[str, float]:
        """How often each source was seen."""
        return {name: stream.rows * self.length / len(stream.tokens.ids) for name, stream in self.streams.items()}

    def state_dict(self) -> dict[str, Any]:
        """The counters to go on from."""
        return {
            name: {"rows": stream.rows, "lanes": [astuple(place) for place in stream.places]}
            for name, stream in self.streams.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, stream in self.streams.items():
            stream.rows = state[name]["rows"]
            stream.places = [Place(*counters) for counters in state[name]["lanes"]]
