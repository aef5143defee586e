"""State that ranks keep as owners of matrices, as checkpoints have it: tensors evenly sharded over a mesh, so that whoever
loads one has nothing to know of owners, and numbers on every rank."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from spectral_ops.optim._exchange import Exchange, Item
from spectral_ops.optim._pieces import Owned, Piece, is_sharded
from spectral_ops.optim._shards import Box, lengths

if TYPE_CHECKING:
    from spectral_ops.optim._sharing import Sharing


def save(sharing: "Sharing", p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter. All ranks of the mesh must call it, since each has something of it."""
    held = sharing.optimizer.state[p]
    saved: dict[str, Tensor] = {}
    for piece, own in sharing.pieces[sharing.numbers[id(p)]]:
        wholes = {name: x for name, x in _fresh(sharing, p, piece).items() if name in held}
        for dtype in dict.fromkeys(x.dtype for x in wholes.values()):
            kin = {name: x for name, x in wholes.items() if x.dtype == dtype}
            saved |= dict(zip(kin, _spread(sharing, piece, own, [held[name] for name in kin], list(kin.values())), strict=True))
    return saved


def load(sharing: "Sharing", p: Tensor, name: str, value: Tensor) -> Tensor:
    """What this rank keeps of a tensor of a parameter's state, of which `value` is the whole, or sharded as `save` made it. All
    ranks of the mesh must call it."""
    if is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    for piece, own in sharing.pieces[sharing.numbers[id(p)]]:
        if name in _fresh(sharing, p, piece):
            if name == "skipped" + sharing.pieces[sharing.numbers[id(p)]][0][0].suffix:
                sharing.skipped[sharing.numbers[id(p)]] = value.flatten()[0]
            return value.reshape(piece.count, *value.shape[len(piece.lead) :])[list(own.own)]
    raise KeyError(name)


def like(p: Tensor, value: Tensor) -> Tensor:
    """A tensor of an elementwise parameter's state, sharded as the parameter is."""
    if value.shape != p.shape or not p.ndim:
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    if is_sharded(value):
        return value.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _fresh(sharing: "Sharing", p: Tensor, piece: Piece) -> dict[str, Tensor]:
    """A new state by the names it has, without data."""
    group = sharing.optimizer.param_groups[sharing.members[sharing.numbers[id(p)]].number]
    return {name + piece.suffix: x for name, x in sharing.optimizer._fresh(group, piece.on_meta()).items()}


def _spread(sharing: "Sharing", piece: Piece, own: Owned, rows: list[Tensor], wholes: list[Tensor]) -> list[Tensor]:
    """Stacks of the rows that this rank owns, each as the tensor that it is of, which has the shape of `wholes`."""
    placements = [sharing.ranks.even if whole.ndim else () for whole in wholes]
    shards = [sharing.ranks.shards(whole.shape, each) for whole, each in zip(wholes, placements, strict=True)]
    owners = [unit.owner for unit in sharing.units if unit.piece is piece]
    items = [
        Item(owner, _row(piece, number, whole), where)
        for whole, where in zip(wholes, shards, strict=True)
        for number, owner in enumerate(owners)
    ]
    mine = {
        i * len(owners) + number: x.view(lengths(_row(piece, number, wholes[i])))
        for i, stack in enumerate(rows)
        for number, x in zip(own.own, stack, strict=True)
    }
    dtype, device = rows[0].dtype, sharing.device
    parts = [torch.empty(lengths(where.boxes[sharing.rank]), dtype=dtype, device=device) for where in shards]
    message = Exchange(items, sharing.rank, sharing.group).to_holders(mine, dtype, device)
    message.unpack({i: parts[i // len(owners)] for i in range(len(items))})
    return [
        DTensor.from_local(part, sharing.mesh, each, run_check=False, shape=x.shape, stride=x.stride()) if each else part
        for part, each, x in zip(parts, placements, wholes, strict=True)
    ]


def _row(piece: Piece, number: int, whole: Tensor) -> Box:
    """Which part of a tensor of a piece's state a matrix has."""
    lead = len(piece.lead)
    return (*[(number, number + 1)] * lead, *((0, size) for size in whole.shape[lead:]))
