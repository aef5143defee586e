"""Which matrices of a parameter group update their factors in a step, so that no step costs more than another.

The matrices stand in a row, shape after shape, each as long as its factors' update costs. With an interval of `k` the row is
cut into `k` equal lengths, and step `t` takes those whose middle lies in length `t mod k`: of each shape, neighbours.
"""

import math
from collections.abc import Iterable

from spectral_ops.optim._pieces import Piece


class Schedule:
    def __init__(self, pieces: Iterable[Piece], interval: int):
        """`pieces` are all of the group, whether they have a gradient or not: a missing one must not shift the others."""
        shapes: dict[tuple[int, ...], list[Piece]] = {}
        for piece in pieces:
            shapes.setdefault(piece.dims, []).append(piece)
        self.interval, self.length = interval, 0
        self.places: dict[tuple[int, int], int] = {}
        for members in shapes.values():
            for piece in members:
                self.places[piece.index, piece.start] = self.length
                self.length += piece.count * _cost(piece)

    def rows(self, members: list[Piece], step: int) -> slice:
        """Of a batch made of `members`, the matrices whose turn it is in this step."""
        turn = step % self.interval
        return slice(*(sum(self._before(piece, t) for piece in members) for t in (turn, turn + 1)))

    def _before(self, piece: Piece, turn: int) -> int:
        """How many matrices of a piece have their turn before this one: `j` for which `(place + (j + ½) cost) · interval` is
        less than `turn · length`, in whole numbers."""
        cost = _cost(piece) * self.interval
        left = 2 * (turn * self.length - self.places[piece.index, piece.start] * self.interval)
        return piece.before(-((cost - left) // (2 * cost)))


def _cost(piece: Piece) -> int:
    """Of a matrix: what the products with its factors take, but for a constant."""
    return math.prod(piece.dims) * sum(piece.dims)
