"""Which parameter takes which method, decided by the module that owns it and by its name."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Names that timm, Hugging Face, torchtitan and nanoGPT give to embeddings, heads and learned tokens.
_ELEMENTWISE_NAME = re.compile(
    r"(^|[._])(embed\w*|embedding\w*|\w*_embed|\w*_embedding|\w*_emb|wte|wpe|cls_token|\w*_token|rel_pos\w*|relative_\w*"
    r"|lm_head|head|heads|classifier|score|unembed|unembedding)([._]|$)"
)
_NORM = re.compile(r"Norm")


def elementwise_name(name: str) -> bool:
    """Whether a parameter's name says that it is an embedding, a head or a learned token."""
    return _ELEMENTWISE_NAME.search(name) is not None


def route(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield `(name, parameter, kind)` once for each trainable parameter, tied ones under their first name.

    `kind` is `"matrix"` for hidden weights of two or more dimensions, `"conv1d"` for those whose three dimensions are not a
    batch of matrices, `"adamw"` for embeddings, output heads and norms, and `"undecayed"` for everything of fewer than
    two dimensions.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            full_name = f"{prefix}.{name}" if prefix else name
            if parameter.ndim < 2:
                yield full_name, parameter, "undecayed"
            elif id(parameter) in embedded or _NORM.search(type(module).__name__) or elementwise_name(full_name):
                yield full_name, parameter, "adamw"
            else:
                yield full_name, parameter, "conv1d" if isinstance(module, nn.Conv1d) else "matrix"


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups that print themselves as a table: one row for each algorithm and shape."""

    def __str__(self) -> str:
        rows = [("algorithm", "lr", "weight decay", "shape", "count", "parameters", "for example")]
        for group in self:
            shapes: dict[tuple[int, ...], list[tuple[str, int]]] = {}
            for name, p in zip(group["param_names"], group["params"], strict=True):
                shapes.setdefault(tuple(p.shape), []).append((name, p.numel()))
            for shape, members in shapes.items():
                size = sum(numel for _, numel in members)
                label = " x ".join(map(str, shape)) or "scalar"
                rows.append(
                    (
                        group["algorithm"],
                        f"{float(group['lr']):g}",
                        f"{group['weight_decay']:g}",
                        label,
                        str(len(members)),
                        f"{size:,}",
                        members[0][0],
                    )
                )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    __repr__ = __str__


def param_groups(
    model: nn.Module, lr: float = 2e-2, adamw_lr: float | None = None, weight_decay: float = 0.0, *, verbose: bool = False
) -> ParamGroups:
    """Split a model: hidden matrices to the matrix method; embeddings, heads, norms and biases to AdamW.

    Args:
        model: its parameters that require a gradient are taken, tied ones once.
        lr: learning rate of the matrix method; default: SpectralKron's.
        adamw_lr: learning rate of AdamW; default: `lr`.
        weight_decay: decoupled decay of the hidden matrices, embeddings and heads. Parameters of fewer than two
            dimensions (norms and biases) are not decayed.
        verbose: print the table; `print(groups)` does so at any time.

    Returns:
        A list of parameter groups for any optimizer of `spectral_ops.optim`. Each names its `algorithm`
        (`"matrix"` or `"adamw"`) and its `param_names`. A parameter is moved by hand by moving it between the lists.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: it has no parameter that requires a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes an nn.Module as `model`, got {type(model).__name__}")
    adamw_lr = lr if adamw_lr is None else adamw_lr
    kinds = {
        "matrix": {"lr": lr, "weight_decay": weight_decay, "algorithm": "matrix"},
        "conv1d": {"lr": lr, "weight_decay": weight_decay, "algorithm": "matrix", "conv": True},
        "adamw": {"lr": adamw_lr, "weight_decay": weight_decay, "algorithm": "adamw"},
        "undecayed": {"lr": adamw_lr, "weight_decay": 0.0, "algorithm": "adamw"},
    }
    members: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in kinds}
    for name, parameter, kind in route(model):
        members[kind].append((name, parameter))
    groups = ParamGroups(
        {"params": [p for _, p in members[kind]], "param_names": [name for name, _ in members[kind]], **options}
        for kind, options in kinds.items()
        if members[kind]
    )
    if not groups:
        raise ValueError("param_groups found no parameter that requires a gradient in `model`")
    if verbose:
        print(groups)
    return groups
