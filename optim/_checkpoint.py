"""Loading a checkpoint: all of it is checked before anything changes, and every tensor gets the dtype that a new state has."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectral_ops.optim._pieces import name_of

if TYPE_CHECKING:
    from spectral_ops.optim._engine import MatrixOptimizer

ADDED_LATER = "skipped"  # older checkpoints lack it; it starts anew


class Loading:
    """One call of `load_state_dict`, as the two hooks that do what torch's own does not."""

    def __init__(self, optimizer: "MatrixOptimizer"):
        self.optimizer, self.title = optimizer, f"{type(optimizer).__name__}.load_state_dict"
        self.values: list[tuple[Tensor, str, Tensor, torch.dtype]] = []  # of a parameter: name, saved, dtype of a new one
        self.functions = [{name: x for name, x in group.items() if callable(x)} for group in optimizer.param_groups]

    def check(self, _: Any, state_dict: dict[str, Any]) -> None:
        """Raise where the checkpoint does not fit."""
        for key, kind in (("state", dict), ("param_groups", list)):
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(
                    f"{self.title}: the state of an optimizer has a {kind.__name__} {key!r}, this has "
                    f"{', '.join(map(repr, list(state_dict)[:8])) or 'nothing'}"
                )
        groups, saved_groups = self.optimizer.param_groups, state_dict["param_groups"]
        if any("params" not in group for group in saved_groups):
            raise ValueError(f"{self.title}: a parameter group of the checkpoint does not tell its 'params'")
        sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"{self.title}: the groups have {sizes} parameters, those of the checkpoint {saved_sizes}")
        for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
            names = {"param_names": group["param_names"]} if "param_names" in group else {}
            merged = self.optimizer.defaults | names | saved_group | self.functions[number] | {"params": group["params"]}
            self.optimizer._check_group(merged)
            for i, saved_id in enumerate(saved_group["params"]):
                if saved := state_dict["state"].get(saved_id):
                    self._check_parameter(number, merged, i, saved)

    def _check_parameter(self, number: int, group: dict[str, Any], i: int, saved: dict[str, Any]) -> None:
        p, expected = group["params"][i], self.optimizer._expected_state(number, group, i)
        if not isinstance(saved, dict):
            raise ValueError(f"{self.title}: the state of {name_of(group, i)} must be a dict, got {type(saved).__name__}")
        missing = [name for name in expected if name not in saved and not name.startswith(ADDED_LATER)]
        if missing:
            raise ValueError(
                f"{self.title}: the state of {name_of(group, i)} lacks {missing}; it has {list(saved)}. It was made by another "
                "optimizer or by other options."
            )
        for name, new in expected.items():
            value = saved[name] if name in saved else torch.zeros(new.shape)
            if not isinstance(value, Tensor | int | float):
                raise ValueError(f"{self.title}: {name!r} of {name_of(group, i)} must be a tensor, got {value!r}")
            value = torch.as_tensor(value)
            if value.shape != new.shape:
                raise ValueError(
                    f"{self.title}: {name!r} of {name_of(group, i)} must have shape {tuple(new.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            self.values.append((p, name, value, new.dtype))

    def restore(self, _: Any) -> None:
        """Put the saved values in place of those that torch cast to the dtype of the parameter, and back what is not saved."""
        for group, functions in zip(self.optimizer.param_groups, self.functions, strict=True):
            group.update(functions)
        shared = bool(self.optimizer._share())
        for p, name, value, dtype in self.values:
            mine = self.optimizer._restored(p, name, value) if shared else value
            self.optimizer.state[p][name] = mine.to(device=p.device, dtype=dtype, copy=True)
