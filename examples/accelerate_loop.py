"""Train a small language model in a loop of accelerate, with gradient accumulation, and SpectralKron.

python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py --precision bf16
python examples/accelerate_loop.py --output DIR --resume     # from the checkpoint in DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_ops.bench.tasks import Text
from spectral_ops.bench.training import cosine
from spectral_ops.optim import SpectralKron, param_groups

BATCHES = 64  # in an epoch


# --8<-- [start:loop]
def train(accelerator: Accelerator, model: nn.Module, loader: DataLoader, options: argparse.Namespace) -> nn.Module:
    factors = torch.bfloat16 if options.precision == "bf16" else None
    optimizer = SpectralKron(param_groups(model, weight_decay=0.1), preconditioner_dtype=factors)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, options.steps))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    batch = 0
    if options.resume:
        accelerator.load_state(options.output)
        batch = scheduler.scheduler.last_epoch * accelerator.gradient_accumulation_steps
    while batch < options.steps * accelerator.gradient_accumulation_steps:
        epoch, done = divmod(batch, len(loader))
        loader.set_epoch(epoch)  # the order of an epoch depends on its number, so that it can be resumed within
        for x, y in accelerator.skip_first_batches(loader, done):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            batch += 1
            step, rest = divmod(batch, accelerator.gradient_accumulation_steps)
            if rest == 0:
                accelerator.print(f"step {step}  loss {loss.item():.6f}")
                if step == options.save_at:
                    accelerator.save_state(options.output)
                if step == options.steps:
                    break
    return accelerator.unwrap_model(model)
# --8<-- [end:loop]


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--accumulate", type=int, default=2, metavar="N", help="batches in a step; default: 2")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="default: no")
    parser.add_argument("--output", default="out/accelerate", metavar="DIR", help="default: out/accelerate")
    parser.add_argument("--save-at", type=int, metavar="N", help="after so many steps; default: at the end")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in the output folder")
    options = parser.parse_args(argv)
    options.save_at = options.save_at or options.steps
    Path(options.output).mkdir(parents=True, exist_ok=True)

    set_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate, mixed_precision=options.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )  # fmt: skip
    task = Text("tiny")
    batches = [task.batch(torch.Generator().manual_seed(i)) for i in range(BATCHES)]
    data = TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    return train(accelerator, task.model(), DataLoader(data, batch_size=task.preset.batch, shuffle=True), options)


if __name__ == "__main__":
    main()
