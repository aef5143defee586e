"""Train a small language model with Lightning's automatic optimization and SpectralKron.

python examples/lightning_module.py
python examples/lightning_module.py --output DIR --resume     # from the last checkpoint in DIR
"""

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_ops.bench.tasks import Text, loss
from spectral_ops.bench.training import cosine
from spectral_ops.optim import SpectralKron, param_groups


# --8<-- [start:module]
class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, steps: int):
        super().__init__()
        self.model, self.steps = model, steps

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        value = loss(self.model, batch)
        self.log("loss", value)
        return value

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = SpectralKron(param_groups(self.model, weight_decay=0.1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
# --8<-- [end:module]


class Losses(lightning.Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        print(f"step {trainer.global_step}  loss {trainer.callback_metrics['loss']:.6f}")


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--batches", type=int, default=25, metavar="N", help="in an epoch; default: 25")
    parser.add_argument("--output", default="out/lightning", metavar="DIR", help="default: out/lightning")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in the output folder")
    options = parser.parse_args(argv)

    lightning.seed_everything(0, verbose=False)
    task = Text("tiny")
    batches = [task.batch(torch.Generator().manual_seed(i)) for i in range(options.batches)]
    trainer = lightning.Trainer(
        max_epochs=options.epochs, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        callbacks=[ModelCheckpoint(options.output, save_last=True, save_top_k=-1), Losses()],
    )  # fmt: skip
    module = Module(task.model(), options.epochs * options.batches)
    checkpoint = f"{options.output}/last.ckpt" if options.resume else None
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
    return module.model


if __name__ == "__main__":
    main()
