"""What a model itself answers: chats that wait for an answer -> its greedy answers, as rows of `messages`.

Owns the generation: batched with padding on the left, always the most probable token, whatever sampling or penalties
the model's own generation_config asks for, so that the answers are the distribution that a KL is to. Must not train or
measure. Trade-off: a batch is rounded otherwise than a prompt alone, so that in half precision two tokens that are as
good as equally probable may change places.
"""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from logitcache.errors import InvalidData, UnsupportedModel
from logitcache.events import Progress
from logitcache.models.device_map import input_device
from logitcache.models.head import causal_lm_of, check_length, evaluation_mode
from logitcache.models.loading import find_model, first_line, load_as, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.storage.files import replace_file

from .compare import check_adapter, load_adapter
from .prompts import Prompt, everyday_prompts, read_prompts
from .settings import AnswerSettings


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    prompt: Prompt
    text: str
    #: Generated, without the one that ends the answer.
    num_tokens: int
    #: Whether the limit ended it, and not the model.
    is_cut: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing that can be seen was said."""
        return not self.text.strip()


@dataclass(frozen=True)
class Answered:
    """The answers of a model, in the order of the prompts."""

    answers: tuple[Answer, ...]

    @property
    def kept(self) -> tuple[Answer, ...]:
        """Those that say something."""
        return tuple(answer for answer in self.answers if not answer.is_empty)

    @property
    def num_cut(self) -> int:
        """Of those that are kept, how many the limit ended."""
        return sum(answer.is_cut for answer in self.kept)

    @property
    def num_empty(self) -> int:
        """Prompts to which nothing was said; there is no row of them."""
        return len(self.answers) - len(self.kept)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a data set, one an answer that is kept."""
        return [answer.prompt.answered(answer.text) for answer in self.kept]

    def write(self, path: str | Path) -> None:
        """Write the rows as JSONL, whole or not at all. Raises `InvalidData` where every answer is empty."""
        rows = self.rows()
        if not rows:
            raise InvalidData(
                f"writing {path}: expected an answer at least, found {len(self.answers):,} empty ones. Nothing was "
                "written. Check that the model is one that answers chats."
            )
        replace_file(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def answers(
    model: str | Path,
    prompts: str | Path | Sequence[Prompt] | None,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    settings: AnswerSettings | None = None,
    loading: LoadSettings | None = None,
    progress: Progress = lambda _: None,
) -> Answered:
    """What a model, or an adapter of it, answers to prompts, written to `out` as rows of `messages`.

    prompts: a file (`read_prompts`), prompts in memory, or None for the 100 everyday ones that come with the package.
    Text that the base itself said is where forgetting shows first: `evaluate` and `sweep` take the file as prior text.
    progress: is told the number of prompts. Raises FileExistsError where `out` is there, what loading raises, and as
    `answers_of`.
    """
    if Path(out).exists():
        raise FileExistsError(errno.EEXIST, "the file exists", str(out))
    source, held = find_model(str(model)), loading or LoadSettings()
    chats = everyday_prompts() if prompts is None else prompts
    chats = read_prompts(chats) if isinstance(chats, (str, Path)) else chats
    tokenizer, base = load_tokenizer(source), load_as(source, held)
    answering: nn.Module = base.model
    if adapter is not None:
        check_adapter(str(adapter), base)
        answering = load_adapter(base.model, str(adapter), held.device_map)
    answered = answers_of(answering, tokenizer, chats, settings or AnswerSettings(), progress)
    answered.write(out)
    return answered


def answers_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    settings: AnswerSettings = AnswerSettings(),  # noqa: B008
    progress: Progress = lambda _: None,
) -> Answered:
    """What a loaded model, with an adapter or without, answers greedily; the same in any batch, up to rounding.

    progress: is told the number of prompts. Raises `UnsupportedModel` for a model without a chat template and for a
    prompt that leaves no room for an answer, `InvalidData` for one that the template refuses.
    """
    causal_lm = causal_lm_of(model)
    chats = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert tokenizer is not None or not chats
    for ids, prompt in zip(chats, prompts, strict=True):
        _check_room(causal_lm, len(ids), settings.max_new_tokens, prompt.origin)
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    found: dict[int, Answer] = {}
    with torch.inference_mode(), evaluation_mode(model), _greedy(causal_lm, tokenizer, settings) as ends:
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            input_ids, mask = _padded([chats[i] for i in batch])
            where = input_device(causal_lm)
            output: Any = causal_lm.generate(input_ids=input_ids.to(where), attention_mask=mask.to(where))
            for i, row in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                found[i] = _answer(prompts[i], row, ends, tokenizer)
            progress(len(batch))
    return Answered(tuple(found[i] for i in range(len(chats))))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> list[int]:
    if tokenizer is None or tokenizer.chat_template is None:
        raise UnsupportedModel(
            "answering prompts: expected a tokenizer with a chat template beside the model, found none. A chat cannot "
            "be put to it. Give a model that was tuned for chats."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=True, return_dict=True, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise InvalidData(
            f"answering {prompt.origin}: the chat template refuses its messages ({first_line(error)}). Leave it out."
        ) from error
    return list(encoded["input_ids"])


def _check_room(causal_lm: PreTrainedModel, num_tokens: int, max_new_tokens: int, origin: str) -> None:
    """Raise `UnsupportedModel` where a prompt and its answer are longer than what the model was made for."""
    limit = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise UnsupportedModel(
            f"answering {origin}: its {num_tokens:,} tokens and an answer of {max_new_tokens:,} are more than the "
            f"{limit:,} positions of the model. Use a smaller --max-new-tokens, or shorten the prompt."
        )
    check_length(causal_lm, num_tokens + max_new_tokens)


@contextmanager
def _greedy(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: AnswerSettings
) -> Iterator[frozenset[int]]:
    """The model's own generation_config set aside for a greedy one; yields the tokens that end an answer.

    Set aside, and not given to `generate`: what another one leaves open is filled from it, penalties included.
    """
    own: Any = causal_lm.generation_config
    said = own.eos_token_id if own is not None and own.eos_token_id is not None else causal_lm.config.eos_token_id
    ends = {*(said if isinstance(said, list) else [said]), getattr(tokenizer, "eos_token_id", None)} - {None}
    causal_lm.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    try:
        yield frozenset(ends)
    finally:
        causal_lm.generation_config = own


def _padded(chats: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [B, T], with padding on the left."""
    longest = max(map(len, chats))
    ids = torch.tensor([[0] * (longest - len(chat)) + chat for chat in chats])
    return ids, torch.tensor([[0] * (longest - len(chat)) + [1] * len(chat) for chat in chats])


def _answer(
    prompt: Prompt, generated: list[int], ends: frozenset[int], tokenizer: PreTrainedTokenizerBase | None
) -> Answer:
    stop = next((at for at, token in enumerate(generated) if token in ends), None)
    kept = generated[:stop]
    text: Any = (
        ""
        if tokenizer is None
        else tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    if stop is None:  # the limit may have fallen inside a character
        text = text.rstrip("\ufffd")
    return Answer(prompt, text, len(kept), stop is None)
