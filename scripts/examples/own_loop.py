"""A training loop of one's own with the base from a cache: `CachedLoss` in place of the loss.

logitcache precompute --model base/ --data train.jsonl --cache cache/
python scripts/examples/own_loop.py --model base/ --cache cache/ --data train.jsonl --out adapter/
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from logitcache import CachedLoss, Objective


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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    set_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = tokenized(args.data, tokenizer)

    anchored = CachedLoss(args.cache, Objective(weight=args.weight))  # 1: the cache, and what is compared
    collate = anchored.collator(DataCollatorForSeq2Seq(tokenizer))  # 2: any collator; workers look up ahead
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    batches = DataLoader(rows, batch_size=8, sampler=order.tolist(), collate_fn=collate)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * len(batches)), len(batches))
    model.train()
    for step, batch in enumerate(batches, 1):
        found = anchored(model, {name: value.to(device) for name, value in batch.items()})  # 3: mean CE + weight * KL
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {found.loss:.4f}, CE {found.ce:.4f}, KL {found.kl:.4f} nats a position")
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
