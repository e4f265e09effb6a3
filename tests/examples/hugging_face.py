"""Hugging Face's Trainer with our optimizer and schedule: ``optimizers=``; a tiny Llama from a config, nothing downloaded."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from torchcalc.optim import AdamW


def main(folder: Path) -> float:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    words = torch.arange(64)[:, None].add(torch.arange(8)) % 29 + 3
    data = [{"input_ids": row, "labels": row} for row in words]
    optimizer = AdamW(model.parameters(), lr=0.02, max_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=32, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        disable_tqdm=True, save_steps=16, logging_steps=16, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    resumes = (folder / "checkpoint-16").exists()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-16") if resumes else None)
    model.eval()
    with torch.no_grad():
        return model(input_ids=words, labels=words).loss.item()


if __name__ == "__main__":
    print(f"loss {main(Path(sys.argv[1])):.4f}")
