"""Train a small Llama on bytes with the Hugging Face Trainer and SpectralKron.

python examples/huggingface_trainer.py
python examples/huggingface_trainer.py --by class                # the class and its options, in place of a factory
python examples/huggingface_trainer.py --output DIR --resume     # from the last checkpoint in DIR
"""

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from spectral_ops.bench.tasks import read_text
from spectral_ops.optim import SpectralKron, param_groups

CONTEXT = 64


# --8<-- [start:optimizer]
def build(model: nn.Module, **options: object) -> SpectralKron:
    """The Trainer calls this with the model as it is trained, after FSDP has replaced its parameters."""
    return SpectralKron(param_groups(model, lr=2e-2, weight_decay=0.1), **options)


def by_factory(model: nn.Module, **rest: object) -> Trainer:
    return Trainer(model, optimizer_cls_and_kwargs=(lambda: build, {"betas": (0.9, 0.5)}), **rest)


def by_class(model: nn.Module, **rest: object) -> Trainer:
    """Without `params` the Trainer makes groups without names, where embeddings cannot be told from hidden matrices."""
    groups = param_groups(model, lr=2e-2, weight_decay=0.1)
    return Trainer(model, optimizer_cls_and_kwargs=(SpectralKron, {"params": groups, "betas": (0.9, 0.5)}), **rest)
# --8<-- [end:optimizer]


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("factory", "class"), default="factory", help="default: factory")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--output", default="out/huggingface", metavar="DIR", help="default: out/huggingface")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in the output folder")
    options = parser.parse_args(argv)

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    text = torch.frombuffer(bytearray(read_text(None)), dtype=torch.uint8).long()
    rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    trainer = {"factory": by_factory, "class": by_class}[options.by](
        model,
        args=TrainingArguments(
            options.output, max_steps=options.steps, per_device_train_batch_size=16, lr_scheduler_type="cosine",
            warmup_steps=min(20, options.steps // 2), max_grad_norm=1.0, save_steps=max(1, options.steps // 2),
            logging_steps=max(1, options.steps // 10), report_to="none", disable_tqdm=True, seed=0,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume)
    return model


if __name__ == "__main__":
    main()
