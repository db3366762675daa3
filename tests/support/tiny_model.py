"""A tiny random Llama with a byte-level tokenizer, and rows of text for it."""

from typing import Any

import torch

CHAT_TEMPLATE = """\
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def make_tokenizer() -> Any:
    """Byte-level, without merges: 256 bytes and <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int = 0, vocab_size: int = 260, **config: Any) -> Any:
    """A random Llama whose logits are wider (260) than its tokenizer's vocabulary (257)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**sizes, **config}))
    for parameter in model.parameters():  # peaked enough for the KL to be more than noise
        parameter.data.mul_(3.0)
    return model.eval()


def text_rows(count: int, longest: int = 60) -> list[dict[str, str]]:
    """Different texts of growing length."""
    return [{"text": f"{i} " + "abc def " * (1 + i * longest // (8 * count))} for i in range(count)]
