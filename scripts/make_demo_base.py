"""Make the demo's base: a tokenizer and a Llama of 2.8 million parameters that know its prose, but no code.

From the training part of `logitcache.demo.text.prose_documents()` (docstrings and language reference
of the running Python) it trains a byte-level BPE tokenizer of 4,096 tokens, then the model from scratch in
float32. It saves both as `from_pretrained` loads them, at most 6,000,000 bytes with float16 weights, loads
them again, and fails if the held-out cross-entropy is not the one before saving. The README.md beside them
says what was made from what. About 11 minutes on 2 idle CPU cores; needs neither network nor GPU.

    python scripts/make_demo_base.py --out pipeline/demo/base
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR

from logitcache.demo.text import Document, code_documents, prose_documents, split

VOCABULARY_SIZE, END = 4096, "<|endoftext|>"
BLOCK_TOKENS, BATCH_BLOCKS = 256, 8
WARMUP_STEPS, WEIGHT_DECAY = 100, 0.1
MAX_FOLDER_BYTES = 6_000_000
MAX_CHANGE_NATS = 0.01  # of the held-out cross-entropy, by saving in float16


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain and part, and their token ids, each ended by the end token."""

    documents: list[Document]
    token_ids: list[list[int]]

    @classmethod
    def of(cls, documents: list[Document], tokenizer: Any) -> Corpus:
        """Tokenize the documents; exits if one does not decode to itself."""
        texts = [document.text for document in documents]
        ids = [tokenizer.encode(text, verbose=False) for text in texts]
        if [tokenizer.decode(text_ids) for text_ids in ids] != texts:
            raise SystemExit("The tokenizer does not decode every document to what it encoded.")
        return cls(documents, [[*text_ids, tokenizer.eos_token_id] for text_ids in ids])

    def blocks(self, order: list[int] | None = None) -> torch.Tensor:
        """The documents in this order, packed: int64 [num_blocks, 256], without the last incomplete block."""
        ordered = self.token_ids if order is None else [self.token_ids[index] for index in order]
        stream = torch.tensor([token for token_ids in ordered for token in token_ids])
        return stream[: len(stream) // BLOCK_TOKENS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS)

    def size(self) -> str:
        """Cells of the README's table: documents, characters, tokens."""
        num_characters = sum(len(document.text) for document in self.documents)
        return f"{len(self.documents):,} | {num_characters:,} | {sum(map(len, self.token_ids)):,}"


def make_tokenizer(documents: list[Document]) -> Any:
    """A byte-level BPE tokenizer trained on the documents; one special token begins, ends and pads."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    settings = {"model_max_length": 512, "clean_up_tokenization_spaces": False}
    wrapped: Any = transformers.PreTrainedTokenizerFast
    return wrapped(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, **settings)


def make_model(tokenizer: Any) -> Any:
    """A freshly initialised Llama in float32, from torch's global generator."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    return transformers.LlamaForCausalLM(config)


@torch.inference_mode()
def cross_entropy_nats(model: Any, blocks: torch.Tensor) -> float:
    """Mean over the 255 predictions of every block, in nats per token."""
    total = 0.0
    for batch in torch.split(blocks, BATCH_BLOCKS):
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return total / len(blocks)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def training_batches(corpus: Corpus, seed: int) -> Iterator[torch.Tensor]:
    """Batches [8, 256] without end; each pass packs the documents in another order, and so cuts them anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        blocks = corpus.blocks(torch.randperm(len(corpus.documents), generator=generator).tolist())
        shuffled = torch.randperm(len(blocks), generator=generator)
        for start in range(0, len(blocks) - BATCH_BLOCKS + 1, BATCH_BLOCKS):
            yield blocks[shuffled[start : start + BATCH_BLOCKS]]


def train(model: Any, corpus: Corpus, held_out: dict[str, torch.Tensor], args: argparse.Namespace) -> float:
    """Train in place for `args.steps` steps; the mean loss of the last 100 in nats per token."""
    decayed, free = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, partial(learning_rate_factor, num_steps=args.steps))
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(islice(training_batches(corpus, args.seed), args.steps), start=1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % args.evaluate_every == 0 or step == args.steps:
            done = [f"step {step}  {time.perf_counter() - start:.0f} s  training {mean(losses[-100:]):.4f}"]
            done += [f"{name} {cross_entropy_nats(model, blocks):.4f}" for name, blocks in held_out.items()]
            print(*done, sep="  ", flush=True)
    return mean(losses[-100:])


def save(model: Any, tokenizer: Any, readme: str, out: Path) -> None:
    """Write the folder: float16 weights under a float32 configuration, the tokenizer and the README."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    (out / "model.safetensors").write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(readme, encoding="utf-8")


def check_saved(out: Path, documents: list[Document], expected_nats: float) -> None:
    """Load the folder and compare its held-out cross-entropy with that of the model that was saved."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", local_files_only=True)
    found_nats = cross_entropy_nats(model, Corpus.of(documents, tokenizer).blocks())
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(f"saved in {out}: {num_bytes:,} bytes, {model.dtype}, prose, held out {found_nats:.4f} nats")
    if not abs(found_nats - expected_nats) <= MAX_CHANGE_NATS or model.dtype != torch.float32:
        raise SystemExit(f"Held-out prose has {found_nats} nats per token as saved, {expected_nats} before.")
    if num_bytes > MAX_FOLDER_BYTES:
        raise SystemExit(f"The saved base has {num_bytes:,} bytes, at most {MAX_FOLDER_BYTES:,} are wanted.")


README = """# The demo's base

A Llama of {num_parameters:,} parameters and a byte-level BPE tokenizer of {vocabulary:,} tokens, trained from
scratch on the docstrings of Python's standard library and its language reference (`pydoc` topics), and on
nothing else: the base of `logitcache demo`, of no use besides. The text is CPython's, under the PSF License
Version 2. The weights are stored in float16 and load in float32.

Made in {minutes:.0f} minutes on the CPU, with {versions}, by

    python scripts/make_demo_base.py --steps {steps} --learning-rate {learning_rate} --seed {seed} \\
        --threads {threads}

| corpus | documents | characters | tokens |
|---|---|---|---|
{sizes}

Training: {steps:,} steps of 8 blocks of 256 tokens, {passes:.1f} passes, float32, AdamW, seed {seed}.
Final training loss, the mean of the last 100 steps: {training:.3f} nats per token.

| held-out part | cross-entropy (nats per token) |
|---|---|
{losses}
"""


def parsed_arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipeline/demo/base"), help="folder to write")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of 8 blocks of 256 tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its highest value")
    parser.add_argument("--seed", type=int, default=0, help="of torch")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between evaluations")
    return parser.parse_args()


def main() -> None:
    args = parsed_arguments()
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    prose, prose_held_out = split(prose_documents())
    code, code_held_out = split(code_documents())
    tokenizer = make_tokenizer(prose)
    parts = {"prose, training": prose, "prose, held out": prose_held_out}
    parts |= {"code, training (unused here)": code, "code, held out": code_held_out}
    corpora = {name: Corpus.of(documents, tokenizer) for name, documents in parts.items()}
    sizes = "\n".join(f"| {name} | {corpus.size()} |" for name, corpus in corpora.items())
    print(sizes, flush=True)
    held_out = {name: corpora[name].blocks() for name in ("prose, held out", "code, held out")}
    quick = {name: blocks[:: max(1, len(blocks) // 160)] for name, blocks in held_out.items()}
    model = make_model(tokenizer).train()
    training = train(model, corpora["prose, training"], quick, args)
    found = {name: cross_entropy_nats(model, blocks) for name, blocks in held_out.items()}
    versions = [f"{part.__name__} {part.__version__}" for part in (torch, transformers, tokenizers)]
    readme = README.format(
        **vars(args),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=VOCABULARY_SIZE,
        minutes=(time.perf_counter() - start) / 60,
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        sizes=sizes,
        passes=args.steps * BATCH_BLOCKS * BLOCK_TOKENS / sum(map(len, corpora["prose, training"].token_ids)),
        training=training,
        losses="\n".join(f"| {name} | {nats:.3f} |" for name, nats in found.items()),
    )
    save(model, tokenizer, readme, args.out)
    check_saved(args.out, prose_held_out, found["prose, held out"])


if __name__ == "__main__":
    main()
