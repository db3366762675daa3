"""TRL's SFTTrainer with the base from a cache that fills itself: mix `CachedKL` in, name the cache and what to compare.

    python scripts/examples/trl_sft.py --model base/ --cache cache/ --data train.jsonl --out adapter/

The first run captures what the cache lacks of the data, before it trains; later ones read it. --packing packs documents
(best fit decreasing) without padding; each is still found, by its own tokens. --assistant-only learns the assistant's
turns of chats.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from logitcache import CachedKL, Objective


class CachedSFTTrainer(CachedKL, SFTTrainer):  # 1: the mixin before the trainer's own class
    """An SFTTrainer whose loss is cross-entropy + weight * KL to the cached base."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "cache", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--assistant-only", action="store_true")
    args = parser.parse_args(arguments)

    rows = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(args.model)
    trainer = CachedSFTTrainer(
        cache=args.cache,  # 2: where it is, or will be; `logitcache precompute` may have made it
        fill=True,  # the base runs now over what it lacks
        objective=Objective(weight=args.weight),  # 3: what is compared, and how much it counts
        model=model,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=f"{args.out}/checkpoints",
            per_device_train_batch_size=8,
            learning_rate=args.lr,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_length=1024,  # as the cache's, or less: CaptureSettings(max_length=...)
            packing=args.packing,
            assistant_only_loss=args.assistant_only,
            bf16="bfloat16" in str(model.dtype),  # TRL's default is True: autocast, over float32 weights too
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
