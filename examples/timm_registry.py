"""Train a small vision transformer of timm with SpectralKron from timm's registry of optimizers.

python examples/timm_registry.py
python examples/timm_registry.py --output DIR --resume     # from the last checkpoint in DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import VisionTransformer, resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry  # which timm exports nowhere else
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver
from torch import nn

from spectral_ops.bench.tasks import Digits, loss
from spectral_ops.optim import SpectralKron

WARMUP = 1  # epochs


# --8<-- [start:registry]
# The name has no underscore: timm reads "lookahead_NAME" as a wrapper and a name.
default_registry.register(OptimInfo("spectralkron", SpectralKron, has_eps=False, has_betas=True))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What timm calls fallback takes AdamW: here heads, patch embedding, positions and tokens. Norms and biases do anyway."""
    fallback = {"fallback_list": ["head.*", "patch_embed.*"], "fallback_no_weight_decay": True}
    return create_optimizer_v2(model, "spectralkron", lr=2e-2, weight_decay=0.05, **fallback)
# --8<-- [end:registry]


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--batches", type=int, default=25, metavar="N", help="in an epoch; default: 25")
    parser.add_argument("--output", default="out/timm", metavar="DIR", help="default: out/timm")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in the output folder")
    options = parser.parse_args(argv)
    Path(options.output).mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    task = Digits()
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4)
    optimizer = optimizer_of(model)
    scheduler = CosineLRScheduler(optimizer, options.epochs, warmup_t=WARMUP, warmup_lr_init=1e-3)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=options.output, recovery_dir=options.output)

    first = resume_checkpoint(model, f"{options.output}/last.pth.tar", optimizer, log_info=False) if options.resume else 0
    for epoch in range(first, options.epochs):
        scheduler.step(epoch)
        generator, total = torch.Generator().manual_seed(epoch), 0.0
        for _ in range(options.batches):
            images, labels = task.batch(generator)
            value = loss(model, (images.unsqueeze(1), labels))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += value.item()
        print(f"epoch {epoch}  loss {total / options.batches:.6f}")
        saver.save_checkpoint(epoch)
    return model


if __name__ == "__main__":
    main()
