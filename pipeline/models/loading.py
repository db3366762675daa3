"""Load a base and its tokenizer from a folder or a hub id, and say which ones they are.

Owns where weights come from and the fingerprints that go into a cache's manifest. Everything is loaded from local
files, after a download if need be, without remote code. Must not know samples or caches.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from logitcache.errors import InputNotFound, InvalidSettings, UnsupportedModel
from logitcache.storage import ModelIdentity, TokenizerIdentity
from logitcache.storage.configs import config_text, read_config
from logitcache.storage.identity import digest_json, fingerprint_of, own_heads, tensor_digests

from .device_map import DeviceMap, keep_while, spreading
from .head import logits_width
from .quantization import LOAD_IN, held_in, make_trainable, quantization, remedy, stated_format
from .settings import LoadSettings
from .tensor_parallel import dividing
from .tf32 import tf32_is_on

ATTENTIONS, DTYPES = ("eager", "sdpa"), ("float32", "bfloat16", "float16")
"""What may be loaded by name: transformers takes other names of an attention for code to be downloaded."""

_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_DOWNLOADED = [*_TOKENIZER_FILES, "*.safetensors"]
_PADDING = re.compile(r"(?<![a-z])pad(?![a-z])", re.IGNORECASE)
"""In the content of an added token: there for padding, whoever uses it."""


@dataclass(frozen=True)
class Source:
    """A base on disk: the name the user gave, and the folder that holds it."""

    name: str
    folder: Path
    #: Branch, tag or commit of a hub id, where another than main was asked for.
    revision: str | None = None


@dataclass(frozen=True)
class Base:
    """A loaded base and what identifies it."""

    source: Source
    model: PreTrainedModel
    identity: ModelIdentity


def find_model(name: str, revision: str | None = None) -> Source:
    """The folder of a model: itself where it is one, else the local snapshot of the hub id, downloaded if missing.

    revision: a branch, tag or commit of a hub id; None: main.
    Raises `InputNotFound`, or `UnsupportedModel` where the folder lacks config.json or safetensors weights, or where
    transformers would load other files than are fingerprinted here: an adapter that lies there too, on the base that it
    names, or what `transformers_weights` names in config.json.
    """
    folder = _folder_of(name, _DOWNLOADED, revision)
    weights = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    for files, what in (([folder / "config.json"], "a config.json"), (weights, "weights (model.safetensors)")):
        if not any(file.is_file() for file in files):
            raise UnsupportedModel(
                f"loading model {name!r}: expected {what} in {folder}, found none. "
                "Save the model there with save_pretrained()."
            )
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModel(
            f"loading model {name!r}: {folder} holds an adapter (adapter_config.json) beside the weights. "
            "Give a folder of the base alone."
        )
    _check_weights_name(name, folder)
    return Source(name, folder, revision)


def _check_weights_name(name: str, folder: Path) -> None:
    """Raise `UnsupportedModel` where config.json names another file of weights than the one that is fingerprinted."""
    try:
        other = read_config(folder).get("transformers_weights")
    except (OSError, ValueError, RecursionError):  # told, by name, when it is loaded
        return
    if other is not None:
        raise UnsupportedModel(
            f"loading model {name!r}: transformers_weights in its config.json names {str(other)!r:.80}, which "
            "transformers would load in place of model.safetensors, whose fingerprint a cache carries. Rename that "
            "file to model.safetensors and remove the field, or save the model with save_pretrained()."
        )


def read_shape(name: str, dtype: str, revision: str | None = None) -> tuple[Any, torch.dtype]:
    """transformers' configuration of a model, and the number format that its weights would have in memory; they are
    neither read nor downloaded. dtype: as of `load_base`; revision: as of `find_model`."""
    config = config_of(Source(name, _folder_of(name, ["config.json"], revision)))
    stated = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return config, stated if isinstance(stated, torch.dtype) else torch.float32


def find_tokenizer(name: str) -> Source:
    """`find_model` where only the tokenizer is needed: a folder without weights will do, and none are downloaded."""
    return Source(name, _folder_of(name, _TOKENIZER_FILES))


def _folder_of(name: str, patterns: list[str], revision: str | None = None) -> Path:
    if Path(name).is_dir():
        if revision is not None:
            raise InvalidSettings(f"--revision {revision}: {name} is a local folder, which has one. Leave it out.")
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, revision=revision))
    except Exception as error:  # the hub client raises many kinds: offline, unknown id, gated, not an id at all
        raise InputNotFound(
            f"loading model {name!r}: no such folder, and the hub did not give it ({first_line(error)}). "
            "Check the spelling, or the network."
        ) from error


def load_base(
    source: Source,
    dtype: str,
    device: torch.device,
    load_in: str | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: bool = False,
    attention: str | None = None,
) -> Base:
    """The causal language model in `source`, in evaluation mode, with every weight read from its files.

    dtype: auto (that of the checkpoint), float32, bfloat16 or float16. load_in: a row of `quantization.LOAD_IN`, in
    which to hold the linear layers; the identity says so. device_map: over which devices to spread the layers, in place
    of `device`; tensor_parallel: divide every layer over torchrun's processes (`tensor_parallel`), which must then do
    the same together; at most one of the two. attention: eager, sdpa or another, else what transformers chooses. Raises
    `UnsupportedModel` where a weight is missing from the files (it would be random), the folder is not a causal
    language model or cannot be divided so, `InputNotFound` where the package that quantises is not installed.
    """
    stated = checkpoint_format(source)
    _check_load_in(source, stated, load_in, tensor_parallel)
    with contextlib.ExitStack() as stack:
        how: dict[str, Any] = {}
        if device_map is not None:
            how = stack.enter_context(spreading(device_map, source.name))
        elif tensor_parallel:
            how = dividing(config_of(source).get_text_config(), source.name)
        if load_in is not None:
            quantising = {} if stated else _quantising(source, dtype, load_in)
            how = {"device_map": {"": str(device)}, **how, **quantising}
        model, info = _from_pretrained(source, dtype, how, attention, stated)
        if device_map is not None:
            keep_while(model, how)
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise UnsupportedModel(
            f"loading model {source.name!r}: {len(missing)} weights are not in its files, or not of the shape that its "
            f"config asks for ({missing[0]}, ...). They would be random. Check that the checkpoint is complete."
        )
    model.eval()
    if not how:
        model.to(device)
    held = _held(model, source, stated, load_in)
    if held in LOAD_IN:
        make_trainable(model, source.name)
    return Base(source, model, identity_of(source, model, held))


def identity_of(source: Source, model: PreTrainedModel, held: str = "") -> ModelIdentity:
    """The identity of a model in memory that has the weights and the configuration of the checkpoint in `source`, which
    is not compared here. held: the format of its weights.

    Raises `UnsupportedModel` where the files cannot be read, or store a head that the config ties to the embedding.
    """
    with _said_in_one_sentence(source):
        digests = tensor_digests(source.folder)
    _check_tied(digests, model.config, source)
    return ModelIdentity(
        weights=fingerprint_of(digests),
        config=_config_text(source),
        vocab_size=logits_width(model),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
        quantization=held,
        tf32=tf32_is_on(),
    )


def checkpoint_format(source: Source) -> str:
    """`quantization.stated_format` of the checkpoint."""
    return stated_format(config_of(source), source.folder, source.name)


def load_as_stated(source: Source, stated: ModelIdentity, device: torch.device) -> Base:
    """`load_base` in the dtype, format and attention of a cache's base; by default where it states none of those that
    may be loaded by name. Whether it is that base is not compared."""
    return load_base(
        source,
        stated.dtype if stated.dtype in DTYPES else "auto",
        device,
        load_in=stated.quantization if stated.quantization in LOAD_IN else None,
        attention=stated.attention if stated.attention in ATTENTIONS else None,
    )


def load_as(source: Source, settings: LoadSettings, attention: str | None = None) -> Base:
    """`load_base` as the settings say. Raises what it raises, and `InputNotFound` where there is no such device."""
    where, spread = pick_device(settings.device), settings.device_map
    return load_base(
        source, settings.dtype, where, settings.load_in, spread, settings.tensor_parallel, attention=attention
    )


def checkpoint_identity(source: Source, dtype: str, attention: str) -> ModelIdentity:
    """The identity of a model that another engine will run, without loading it.

    dtype: auto is that of the checkpoint, as its config says. Raises `UnsupportedModel` where it does not say, or where
    the files cannot be read.
    """
    try:
        digests = tensor_digests(source.folder)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"reading model {source.name!r}: {first_line(error)}. "
            f"Check that the checkpoint in {source.folder} is complete."
        ) from error
    config = config_of(source)
    _check_tied(digests, config, source)
    stated = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(stated, torch.dtype):
        raise UnsupportedModel(
            f"reading model {source.name!r}: its config.json does not say which dtype the weights have. Give --dtype."
        )
    return ModelIdentity(
        weights=fingerprint_of(digests),
        config=_config_text(source),
        vocab_size=int(config.get_text_config().vocab_size),
        dtype=str(stated).removeprefix("torch."),
        attention=attention,
        quantization=checkpoint_format(source),
        tf32=tf32_is_on(),
    )


def _config_text(source: Source) -> str:
    """`config_text` of its config.json. Raises `UnsupportedModel`."""
    try:
        return config_text(read_config(source.folder))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(
            f"loading model {source.name!r}: {first_line(error)}. Repair {source.folder / 'config.json'}."
        ) from error


def _check_tied(digests: Mapping[str, str], config: Any, source: Source) -> None:
    """Raise `UnsupportedModel` for a head that is tied to the embedding by the config, and stored with other values.

    transformers 5 computes with the stored one, other engines with the embedding: the config would not say which.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    could_be_tied = tuple(getattr(kind, "_tied_weights_keys", None) or ())
    heads = [name for name in own_heads(digests) if name.endswith(could_be_tied)]
    if heads and getattr(config.get_text_config(), "tie_word_embeddings", False):
        raise UnsupportedModel(
            f"loading model {source.name!r}: its config ties the output head to the input embedding "
            f"(tie_word_embeddings), its files hold another head ({heads[0]}). Engines differ in which they use. Set "
            "tie_word_embeddings to false in config.json if that head is the model's, or remove it from the files."
        )


def _check_load_in(source: Source, stated: str, load_in: str | None, tensor_parallel: bool) -> None:
    """Raise `UnsupportedModel` where weights cannot be quantised while they are loaded. stated: what they are in."""
    if load_in is None:
        return
    what = f"loading model {source.name!r} in {load_in}"
    if tensor_parallel:
        raise UnsupportedModel(
            f"{what}: packed weights cannot be divided over processes. Spread it with --device-map instead."
        )
    if stated not in ("", load_in):
        raise UnsupportedModel(
            f"{what}: its checkpoint is quantised already ({stated}) and would stay as it is. Leave --load-in out, or "
            "give an unquantised checkpoint."
        )


def _held(model: PreTrainedModel, source: Source, stated: str, load_in: str | None) -> str:
    """How its layers are held: as asked for, or as the checkpoint states, or unpacked from that ("").

    Raises `UnsupportedModel` for anything else: then other engines would name it otherwise.
    """
    held, expected = held_in(model) or "", load_in or stated
    if held == expected or (not held and load_in is None):
        return held
    raise UnsupportedModel(
        f"loading model {source.name!r}: expected weights held in {expected or 'no format'}, found {held or 'none'}. "
        "Its cache would not say what it is of. Give another checkpoint, and please report this one."
    )


def _from_pretrained(
    source: Source, dtype: str, how: dict[str, Any], attention: str | None, stated: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which weights transformers missed."""
    kernels = {} if attention is None else {"attn_implementation": attention}
    with _said_in_one_sentence(source, remedy(stated)):
        found: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            **how,
            **kernels,
        )
    return found


@contextlib.contextmanager
def _said_in_one_sentence(source: Source, advice: str = "") -> Iterator[None]:
    whole = f"Check that the checkpoint in {source.folder} is complete and that of a causal language model."
    try:
        yield
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UnsupportedModel(f"loading model {source.name!r}: {first_line(error)}. {advice or whole}") from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model, or None where there is none (data of token ids need none)."""
    if not any((source.folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UnsupportedModel(
            f"loading the tokenizer of {source.name!r}: {first_line(error)}. "
            f"Save it in {source.folder} again with save_pretrained()."
        ) from error
    return tokenizer


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase | None) -> TokenizerIdentity | None:
    """Fingerprint of what makes token ids of text: vocabulary, merges, normaliser, added tokens, beginning and end.

    Padding never counts: neither which token it is, nor on which side, nor a token that was added for it.
    """
    if tokenizer is None:
        return None
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token")}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # the state of the last call, not the tokenizer's own
        rules.pop("padding", None)
        rules["added_tokens"] = [t for t in rules.get("added_tokens", []) if not _PADDING.search(t["content"])]
    return TokenizerIdentity(digest_json([rules, special]))


def _quantising(source: Source, dtype: str, load_in: str) -> dict[str, Any]:
    """What `from_pretrained` is told; 4-bit weights are multiplied in the dtype of the others."""
    found = getattr(config_of(source), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    wanted = found if isinstance(found, torch.dtype) else torch.float32
    return {"quantization_config": quantization(load_in, wanted, source.name)}


def config_of(source: Source) -> Any:
    """transformers' configuration of a checkpoint. Raises `UnsupportedModel`."""
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise UnsupportedModel(
            f"loading model {source.name!r}: {first_line(error)}. Repair {source.folder / 'config.json'}."
        ) from error


def pick_device(device: str) -> torch.device:
    """auto: cuda where there is one (the process's own under torchrun), else the CPU. Raises `InputNotFound`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputNotFound("using device 'cuda': no CUDA device is available here. Use --device cpu, or auto.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def first_line(error: Exception) -> str:
    """The first line of a library's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
