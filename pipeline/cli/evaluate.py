"""`logitcache evaluate`: what was learnt, what was forgotten."""

import json

import click

from .common import batch_options, config_option, model_option, note, quiet_libraries, runtime_options, token_bar


@click.command(short_help="Learning on new text and forgetting on prior text, in one table.")
@config_option
@model_option
@click.option("--adapter", metavar="DIR", help="Folder of the trained adapter; without it only the base is measured.")
@click.option("--data", required=True, metavar="NEW", help="Held-out text of the new task.")
@click.option("--prior", required=True, metavar="PRIOR", help="Text of what the base knew, to measure forgetting.")
@batch_options
@runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: str,
    adapter: str | None,
    data: str,
    prior: str,
    max_length: int,
    batch_tokens: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure base and adapted model on new and on prior text: learning and forgetting in one table.

    "Before" is the untouched base: two models are in memory here, unlike in training.
    """
    quiet_libraries()
    from ..evaluate import check_adapter, compare, load_adapter
    from ..models import find_model, load_base, load_tokenizer, pick_device
    from ..report import evaluation_rows, table
    from ..rows import read_rows
    from ..samples import make_samples

    source, where = find_model(model), pick_device(device)
    tokenizer = load_tokenizer(source)
    rows = {"new": read_rows(data), "prior": read_rows(prior)}
    base = load_base(source, dtype, where)
    adapted = None
    if adapter is not None:
        check_adapter(adapter, base)
        adapted = load_adapter(load_base(source, dtype, where).model, adapter)
    results = {}
    for name, pairs in rows.items():
        found = make_samples(pairs, tokenizer, max_length, base.identity.vocab_size)
        if found.num_truncated:
            note(f"{name}: {found.num_truncated:,} rows were cut to {max_length} tokens.")
        total = sum(len(s.token_ids) for s in found.samples)
        with token_bar(f"evaluate {name}", total) as progress:
            results[name] = compare(base.model, adapted, found.samples, batch_tokens, progress)
    if as_json:
        click.echo(json.dumps({name: result.as_dict() for name, result in results.items()}, indent=2))
    else:
        click.echo(table(evaluation_rows(results)))
