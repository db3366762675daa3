"""The reference of preference training from the formula: sum over a completion's tokens of log p(token | before it).

DPO (arXiv 2305.18290, eq. 7), IPO (arXiv 2310.12036) and KTO (arXiv 2402.01306) are functions of these sums. Float64,
one sequence at a time, the whole vocabulary, from the checkpoint's weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def sum_of_logprobs(folder: Path, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """log p(completion | prompt), nats. A completion's token without any before it is nobody's label, and left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = [*prompt_ids, *completion_ids]
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    total = 0.0
    for place in range(max(1, len(prompt_ids)), len(tokens)):
        before = logits[place - 1]
        total += float(before[tokens[place]]) - float(torch.logsumexp(before, dim=-1))
    return total
