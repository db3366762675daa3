"""transformers' Trainer with the base from a cache: mix `CachedKL` in, give it the cache and what to compare.

logitcache precompute --model base/ --data train.jsonl --cache cache/
python scripts/examples/transformers_trainer.py --model base/ --cache cache/ --data train.jsonl --out adapter/
"""

import argparse
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from logitcache import CachedKL, Objective


class CachedTrainer(CachedKL, Trainer):  # 1: the mixin before the trainer's own class
    """A Trainer whose loss is cross-entropy + weight * KL to the cached base."""


def tokenized(path: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows of `text` as `logitcache precompute` reads them: the end-of-text token added, everything supervised."""
    texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "cache", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight", type=float, default=1.0)
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    set_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = CachedTrainer(
        cache=args.cache,  # 2: made by `logitcache precompute`
        objective=Objective(weight=args.weight),  # 3: what is compared, and how much it counts
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.out}/checkpoints",
            per_device_train_batch_size=8,
            learning_rate=args.lr,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=tokenized(args.data, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
