"""KL-Shampoo (Lin et al., 2025, "Understanding and Improving Shampoo and SOAP via Kullback–Leibler Minimization") on
`spectral_ops.KroneckerFactor`, which needs no decomposition.

python examples/kl_shampoo.py                  # trains it, SOAP and Shampoo, then times a step of each
python examples/kl_shampoo.py --task digits    # options of the program train
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops import KroneckerFactor


class KLShampoo(Optimizer):
    """`W ← (1 − lr · weight_decay) W − lr · S_C^(−1/2) M S_K^(−1/2)`, for matrices, where `M` is an average of gradients and

        S_C ← β₂ S_C + (1 − β₂)/m · G S_K⁻¹ Gᵀ,   S_K ← β₂ S_K + (1 − β₂)/n · Gᵀ S_C⁻¹ G

    the Kronecker product that is nearest to the gradients' second moment in Kullback–Leibler divergence. These are the averages
    that a `KroneckerFactor` keeps. Matrices of one shape share one.

    Args:
        params: matrices, or groups of them.
        lr, betas, weight_decay: as of AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 3e-3, betas: tuple[float, float] = (0.9, 0.9), weight_decay: float = 0.0
    ):
        self.batches: list[tuple[int, list[Tensor], KroneckerFactor]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        for shape in dict.fromkeys(p.shape for p in params):
            members = [p for p in params if p.shape == shape]
            kind: dict[str, Any] = {"dtype": members[0].dtype, "device": members[0].device}
            factor = KroneckerFactor(*shape, batch=(len(members),), rotation="tracking", validate=False, **kind)
            self.batches.append((len(self.param_groups) - 1, members, factor))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for number, members, factor in self.batches:
            group = self.param_groups[number]
            # --8<-- [start:step]
            beta1, beta2 = group["betas"]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            factor.update(torch.stack(grads), 1 - beta2)
            for p in members:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in members]
            torch._foreach_lerp_(averages, grads, 1 - beta1)
            u = factor.apply(torch.stack(averages), root=2)
            # --8<-- [end:step]
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(members, u.unbind(), alpha=-group["lr"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"factors": [factor.state_dict() for *_, factor in self.batches]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for (*_, factor), state in zip(self.batches, state_dict["factors"], strict=True):
            factor.load_state_dict(state)


if __name__ == "__main__":
    from spectral_ops.bench import steps, train

    train.main(["--methods", "kl_shampoo,soap,shampoo", *sys.argv[1:]])
    steps.main(["--setting", "reuse"])
