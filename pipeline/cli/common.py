"""What the verbs share: the --config file, quiet libraries, progress bars, and options that recur.

Owns the presentation of work in progress: bars with tokens/s and time left, on stderr, silent when it is no terminal.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from logitcache.data.settings import DataSettings
from logitcache.models.settings import LoadSettings
from logitcache.settings import line_settings
from logitcache.storage.plain_text import escaped, safe, shown
from logitcache.yaml_files import NUMBER, WHOLE, at_home, read_number, read_whole, read_yaml

from .help_page import headed
from .options import Whole, options_of, settings_from

F = TypeVar("F", bound=Callable[..., Any])


class CachePath(click.types.StringParamType):
    """A folder, or a URL that fsspec knows."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as text, since a Path would lose the slashes of a URL."""
        text = str(value)
        if "://" not in text and Path(text).is_file():
            self.fail(f"{text} is a file; a cache is a folder.", param, ctx)
        return text


def config_option(function: F) -> F:
    """--config FILE: defaults for the other flags, by their names; an unknown key is an error."""
    option: Callable[[F], F] = click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="YAML file with the same names as these flags; a flag on the line wins.",
    )
    return option(function)


def data_option(help: str, name: str = "data", metavar: str = "D", required: bool = False) -> Callable[[F], F]:
    """--data D, as often as there are data; None where it is not given."""
    option: Callable[[F], F] = click.option(
        f"--{name}",
        multiple=True,
        required=required,
        metavar=metavar,
        callback=lambda _ctx, _param, names: names or None,
        help=f"{help} Again for more.",
    )
    return option


def model_option(function: F) -> F:
    """--model M."""
    option: Callable[[F], F] = click.option(
        "--model", required=True, metavar="M", help="Base model: a local folder or a hub id."
    )
    return option(function)


def batch_options(function: F) -> F:
    """--max-length and --batch-tokens, of text that is read once."""
    length: Callable[[F], F] = click.option(
        "--max-length",
        type=Whole(min=2),
        default=1024,
        show_default=True,
        help="Tokens a sample; the rest is cut.",
    )
    batch: Callable[[F], F] = click.option(
        "--batch-tokens",
        type=Whole(min=1),
        default=8192,
        show_default=True,
        help="Tokens a forward, with padding.",
    )
    return headed(length(headed(batch(function), "How the work is cut")), DataSettings.heading)


def runtime_options(function: F) -> F:
    """--dtype and --device."""
    return _loading("dtype", "device")(function)


def device_option(function: F) -> F:
    """--device."""
    return _loading("device")(function)


def device_map_option(function: F) -> F:
    """--device-map."""
    return _loading("device_map")(function)


def tensor_parallel_option(function: F) -> F:
    """--tensor-parallel N."""
    option: Callable[[F], F] = click.option(
        "--tensor-parallel",
        type=Whole(min=2),
        metavar="N",
        help="Divide every layer of the model over N GPUs, which vLLM starts itself, or over all of torchrun's N "
        "processes, which then are one worker.",
    )
    return option(function)


def log_json_option(function: F) -> F:
    """--log-json, which `terminal.Console` is given."""
    return click.option("--log-json", is_flag=True, help="Say what happens in lines of JSON on stderr.")(function)


def _loading(*names: str) -> Callable[[F], F]:
    return options_of([s for s in line_settings(LoadSettings) if s.key in names])


def check_device_map(device_map: str | None, device: str) -> None:
    """Raise `click.UsageError` where one device and all of them are asked for."""
    settings_from(LoadSettings, {"device_map": device_map, "device": device})


def _load_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        loaded = read_yaml(path)
    except yaml.YAMLError as error:
        raise click.UsageError(f"{path} is not YAML ({error}).", ctx) from error
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise click.UsageError(f"{path}: expected a mapping of flag names to values.", ctx)
    options = [p for p in ctx.command.params if isinstance(p, click.Option) and p.name != "config"]
    known = {opt.removeprefix("--"): str(p.name) for p in options for opt in p.opts}  # --model is --student too
    given = {str(key).replace("_", "-"): value for key, value in loaded.items()}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise click.UsageError(f"{path}: unknown key {shown(unknown[0])}. Known keys: {', '.join(sorted(known))}.", ctx)
    if len({known[key] for key in given}) < len(loaded):
        raise click.UsageError(f"{path}: expected each key once, found one under two spellings.", ctx)
    pairs = {opt.removeprefix("--") for p in options if p.metavar == "NAME=VALUE" for opt in p.opts}
    for key in pairs & given.keys():
        if isinstance(given[key], dict):
            given[key] = [f"{name}={_as_text(value)}" for name, value in given[key].items()]
    several = {opt.removeprefix("--") for p in options if p.multiple for opt in p.opts}
    lists = {key: value for key, value in given.items() if key in several and isinstance(value, list)}
    plain = {key: value for key, value in given.items() if key not in lists}
    nested = [key for key, value in plain.items() if not _is_plain(value)]
    nested += [key for key, values in lists.items() if not values or not all(map(_is_plain, values))]
    if nested:
        found = plain.get(nested[0])
        way = f" Write it as JSON in quotes: '{json.dumps(found, default=str)}'." if isinstance(found, dict) else ""
        raise click.UsageError(f"{path}: expected one plain value for {shown(nested[0])}.{way}", ctx)
    # as text, as on the line: else 8.5 would be a whole number, and true a 1
    texts: dict[str, Any] = {known[key]: at_home(str(value)) for key, value in plain.items()}
    texts |= {known[key]: [at_home(str(value)) for value in values] for key, values in lists.items()}
    texts |= {known[key]: [texts[known[key]]] for key in plain if key in several}
    ctx.default_map = {**(ctx.default_map or {}), **texts}


def _as_text(value: Any) -> str:
    """A value of a mapping as it stands on the line."""
    is_json = isinstance(value, (dict, list, bool)) or value is None
    return json.dumps(_with_numbers(value)) if is_json else str(value)


def _with_numbers(value: Any) -> Any:
    """A value of a file with the texts that are numbers as numbers, at any depth."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    if not isinstance(value, str) or NUMBER.match(value) is None:
        return value
    return read_whole(value) if WHOLE.match(value) else read_number(value)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, (dict, list))


def quiet_libraries() -> None:
    """Let only this program speak: no library's bars, advice or load reports on the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|peft|accelerate|zarr|numcodecs|datasets|bitsandbytes|ray)(\.|$)"
    )
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_hub() -> None:
    """Let the Hub's client show its bars on a terminal, and say nothing else."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


@contextmanager
def token_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens with tokens/s and time left; yields the function that advances it."""
    with progress_bar(description, total) as bar:
        yield bar.update


def progress_bar(description: str, total: int | None, silent: bool = False, unit: str = " tokens") -> Any:
    """tqdm's, over tokens unless another unit is said, at a terminal only."""
    from tqdm import tqdm

    hidden = silent or not sys.stderr.isatty()
    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=hidden, leave=True)


def say(line: str) -> None:
    """A line of a result, on stdout."""
    say_lines(escaped(line))


def note(line: str) -> None:
    """A line for the person at the terminal, on stderr; results go to stdout."""
    say_lines(escaped(line), err=True)


def say_lines(text: str, err: bool = False) -> None:
    """Lines. All that this program prints goes through here: escaped, and without the secrets of URLs."""
    click.echo(safe(text), err=err)


def human_bytes(count: float) -> str:
    """123456 -> '120.6 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
