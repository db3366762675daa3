"""`logitcache train`: an adapter or a whole model, regularised by a cache, or taught by it."""

import os
from pathlib import Path

import click
from click.core import ParameterSource

from .common import (
    CachePath,
    FiniteFloat,
    check_device_map,
    config_option,
    device_map_option,
    load_in_option,
    note,
    quiet_libraries,
    runtime_options,
)

ADAPTERS = (
    *("lora", "dora", "rslora", "gaussian", "orthogonal", "mica", "pissa", "olora", "milora", "corda", "lora-ga"),
    *("lora-null", "eva", "randlora", "vera", "adalora", "loftq"),
)
"""The kinds, and those of PEFT that are refused with a reason; written out, since the table imports PEFT."""

PENALTIES = ("l2-sp", "ewc")
"""On the weights, as `penalties.PENALTIES` has them."""

ADAPTERS_OWN = ("rank", "alpha", "dropout", "target_modules")
"""What has no place where there is no adapter."""


@click.command(short_help="Train an adapter, or a model, against the cached base or teacher.")
@config_option
@click.option(
    "--student",
    "--model",
    "model",
    required=True,
    metavar="M",
    help="Model to train: the base of the cache, or a student of it. A local folder or a hub id.",
)
@click.option(
    "--cache",
    type=CachePath(),
    metavar="DIR",
    help="Cache made by precompute; not needed with --regularizer none, l2-sp or ewc.",
)
@click.option(
    "--teacher-is-not-base",
    is_flag=True,
    help="The cache is of another model with the same tokenizer: its weights and step 0 are not checked.",
)
@click.option(
    "--ignore-padding",
    is_flag=True,
    help="Teacher and student pad their vocabularies to different widths: compare the tokens that both have.",
)
@click.option(
    "--other-precision",
    is_flag=True,
    help="The cache is of the base with its weights in another format than --load-in: the bound of step 0 is wider.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the adapter or model."
)
@click.option("--data", metavar="D", help="Data set to train on; by default the samples of the cache.")
@click.option(
    "--regularizer",
    type=click.Choice(["masked-kl", "masked-reverse-kl", "masked-js", "full-kl", *PENALTIES, "none"]),
    default="masked-kl",
    show_default=True,
    help="masked-*: to the base without the true token, KL, reverse KL or Jensen-Shannon; full-kl: with it; l2-sp: "
    "half the squared change of the adapted weights; ewc: the same weighted by their Fisher information from the new "
    "data; none: plain cross-entropy.",
)
@click.option(
    "--tail",
    type=click.Choice(["auto", "bucket", "groups", "renormalize", "sampled"]),
    default="auto",
    show_default=True,
    help="Tokens beyond the top-k: one outcome together; one a group of the vocabulary; left out with the rest "
    "renormalised; by draws. auto: groups where the cache has them, else bucket.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=None,
    help="Alternatives a position to read; the others join the tail.  [default: all that the cache has]",
)
@click.option("--weight", type=FiniteFloat(min=0), default=1.0, show_default=True, help="Weight of the regulariser.")
@click.option(
    "--label-smoothing",
    type=FiniteFloat(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the true token's mass that is spread over the vocabulary; with --regularizer none.",
)
@click.option(
    "--kl-budget",
    type=FiniteFloat(min=0, min_open=True),
    default=None,
    help="Nats a position: adapt the weight, from --weight on, so that the mean regulariser meets this.",
)
@click.option(
    "--temperature",
    type=FiniteFloat(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of both distributions; other than 1 only with --tail renormalize.",
)
@click.option(
    "--weighting",
    type=click.Choice(["uniform", "non-target-mass"]),
    default="uniform",
    show_default=True,
    help="Weight of a position: the same, or 1 - p(true token).",
)
@click.option(
    "--min-base-rest",
    type=FiniteFloat(0, 1),
    default=1e-4,
    show_default=True,
    help="Leave out positions where the base leaves less than this beside the true token (masked-*).",
)
@click.option(
    "--min-adapted-rest",
    type=FiniteFloat(0, 1),
    default=0.0,
    show_default=True,
    help="No regularisation where the adapted model leaves less than this beside the true token (masked-*).",
)
@click.option(
    "--adapter",
    type=click.Choice([*ADAPTERS, "none"]),
    default="lora",
    show_default=True,
    help="Kind of adapter (docs/adapters.md); none: every weight of the model is trained.",
)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter.")
@click.option(
    "--alpha", type=FiniteFloat(), default=None, help="Scale of the adapter is alpha / rank.  [default: 2 * rank]"
)
@click.option(
    "--nullspace",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    metavar="DIR",
    help="Null spaces made by `logitcache nullspace`; for --adapter lora-null.",
)
@click.option(
    "--variant",
    type=click.Choice(["v1", "v2", "base-intact"]),
    default=None,
    help="Of lora-null: train A and B; B only; leave the base's weights as they are.  [default: v1]",
)
@click.option(
    "--dropout", type=FiniteFloat(0, 1), default=0.0, show_default=True, help="Dropout on the adapter's input."
)
@click.option(
    "--target-modules",
    default="all-linear",
    show_default=True,
    help="Layers to adapt: all-linear (all but the output head), or names separated by commas.",
)
@click.option(
    "--lr", type=FiniteFloat(min=0), default=2e-4, show_default=True, help="Peak learning rate (cosine, 3 % warm-up)."
)
@click.option(
    "--epochs", type=FiniteFloat(min=0, min_open=True), default=1.0, show_default=True, help="Passes over the samples."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Samples a device and micro-batch."
)
@click.option(
    "--grad-accum", type=click.IntRange(min=1), default=1, show_default=True, help="Micro-batches an optimizer step."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the adapter and of the order of samples.",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    help="Optimizer steps; -1: as --epochs says.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=None,
    help="Tokens a sample of --data.  [default: that of the cache; 1024 without one]",
)
@click.option(
    "--log-every", type=click.IntRange(min=1), default=10, show_default=True, help="Steps between log entries."
)
@load_in_option("Quantise the linear layers below the adapter, by bitsandbytes (docs/how-to/distil.md).")
@device_map_option
@runtime_options
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last whole checkpoint.")
def train(
    model: str,
    cache: str | None,
    teacher_is_not_base: bool,
    ignore_padding: bool,
    other_precision: bool,
    out: Path,
    data: str | None,
    regularizer: str,
    tail: str,
    top_k: int | None,
    weight: float,
    label_smoothing: float,
    kl_budget: float | None,
    temperature: float,
    weighting: str,
    min_base_rest: float,
    min_adapted_rest: float,
    adapter: str,
    rank: int,
    alpha: float | None,
    nullspace: Path | None,
    variant: str | None,
    dropout: float,
    target_modules: str,
    lr: float,
    epochs: float,
    batch_size: int,
    grad_accum: int,
    seed: int,
    max_steps: int,
    max_length: int | None,
    log_every: int,
    load_in: str | None,
    device_map: str | None,
    dtype: str,
    device: str,
    resume: bool,
) -> None:
    """Train an adapter on loss = cross-entropy + weight * KL to the cached base. The base is not run again.

    Baselines: --regularizer l2-sp or ewc, a penalty on the weights, and --label-smoothing (docs/loss.md).

    Writes an adapter that PeftModel.from_pretrained reads (--adapter none: a model), files.json (its checksums),
    run.json (what was run), train_log.jsonl and tensorboard/. Interrupted, it goes on with --resume.
    Several GPUs: torchrun --nproc-per-node N -m logitcache train ...
    """
    if regularizer not in ("none", *PENALTIES) and cache is None:
        raise click.UsageError(f"--regularizer {regularizer} needs --cache.")
    if cache is None and data is None:
        raise click.UsageError(f"--regularizer {regularizer} needs --data, or a --cache to take the samples from.")
    if regularizer != "none" and label_smoothing:
        raise click.UsageError(f"--label-smoothing goes with --regularizer none, not with {regularizer}.")
    if regularizer in PENALTIES and kl_budget is not None:
        raise click.UsageError(f"--kl-budget is of a mean KL, which --regularizer {regularizer} knows nothing of.")
    if teacher_is_not_base and regularizer in ("none", *PENALTIES):
        raise click.UsageError(
            f"--teacher-is-not-base with --regularizer {regularizer}: nothing is learnt from the teacher."
        )
    if ignore_padding and not teacher_is_not_base:
        raise click.UsageError("--ignore-padding is for --teacher-is-not-base: a base has the widths of its own cache.")
    if other_precision and (teacher_is_not_base or cache is None):
        raise click.UsageError("--other-precision is for the cache of the student's own base.")
    check_device_map(device_map, device)
    if adapter == "none":
        _check_no_adapter(load_in)
    if regularizer in PENALTIES and (adapter == "none" or load_in is not None):
        raise click.UsageError(
            f"--regularizer {regularizer} is on what an adapter changes of weights that can be read: not with "
            "--adapter none or --load-in."
        )
    if max_steps == 0:
        raise click.UsageError("--max-steps 0 would train nothing: give a positive number, or -1 for --epochs.")
    if adapter == "lora-null" and nullspace is None:
        raise click.UsageError("--adapter lora-null needs --nullspace: make one with `logitcache nullspace`.")
    if adapter != "lora-null" and (nullspace is not None or variant is not None):
        raise click.UsageError(f"--nullspace and --variant are for --adapter lora-null, not for {adapter}.")
    quiet_libraries()
    from logitcache.adapters.attach import AdapterSettings
    from logitcache.adapters.registry import KINDS, check_settings
    from logitcache.data.rows import read_rows
    from logitcache.data.samples import make_samples
    from logitcache.losses.formulas import Objective
    from logitcache.models.loading import find_model, load_base, load_tokenizer, pick_device
    from logitcache.pairing.identity_checks import Pairing, StepZero, check_identity
    from logitcache.pairing.targets import samples_of
    from logitcache.storage import IdentityMismatch, LogitCache
    from logitcache.training.penalties import PenaltySettings
    from logitcache.training.run import TrainSettings
    from logitcache.training.run import train as run

    from .progress import TrainBar

    settings = AdapterSettings(adapter)
    if adapter != "none":
        settings = AdapterSettings(
            adapter,
            rank,
            2.0 * rank if alpha is None else alpha,
            dropout,
            target_modules,
            "" if nullspace is None else str(nullspace),
            variant or "v1",
        )
    check_settings(settings)
    if alpha is not None and not KINDS[adapter].has_alpha:
        raise click.UsageError(f"--alpha has no place in --adapter {adapter}, whose scale is trained. Leave it out.")
    opened = None if cache is None else LogitCache.open(cache)
    if tail == "auto":
        tail = "groups" if opened is not None and opened.manifest.capture.num_tail_groups else "bucket"
    penalty = PenaltySettings(regularizer, weight) if regularizer in PENALTIES else None  # type: ignore[arg-type]
    try:
        objective = Objective(
            regularizer if penalty is None else "none",  # type: ignore[arg-type]  # click has checked the choices
            tail,  # type: ignore[arg-type]
            weight,
            temperature,
            weighting,  # type: ignore[arg-type]
            min_base_rest,
            min_adapted_rest,
            kl_budget,
            label_smoothing=label_smoothing,
        )
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    source = find_model(model)
    tokenizer = load_tokenizer(source)
    rows = None if data is None else read_rows(data)
    base = load_base(source, dtype, pick_device(device), load_in, device_map)
    pairing = Pairing(not teacher_is_not_base, ignore_padding, other_precision)
    if opened is not None:
        check_identity(opened, base, tokenizer, pairing)
        captured = opened.manifest.capture.max_length
        if max_length not in (None, captured) and data is not None:
            raise IdentityMismatch(
                f"pairing {cache} with --max-length {max_length}: the cache was made with {captured}. "
                "The same rows would be other samples. Leave --max-length out, or precompute a cache with it."
            )
        max_length = captured
    if rows is not None:
        found = make_samples(rows, tokenizer, max_length or 1024, base.identity.vocab_size)
        samples = found.samples
        if found.num_truncated:
            note(f"{found.num_truncated:,} rows were cut to {max_length or 1024} tokens.")
    else:
        assert opened is not None
        samples = samples_of(opened)
    speaks = os.environ.get("RANK", "0") == "0"  # torchrun: one process does

    def tell(found: StepZero) -> None:
        if speaks:
            assert opened is not None
            why, theirs, ours = "noise floor", opened.manifest.model.quantization, base.identity.quantization
            if theirs != ours:
                why += f" of {ours or 'unquantised'} weights against a cache of {theirs or 'unquantised'} ones; above "
                why += f"{found.tolerance_nats:.2g} they are refused"
            note(f"Before step 1 the KL to the base was {abs(found.kl_nats):.1g} nats ({why}).")

    if teacher_is_not_base and opened is not None and speaks:
        note(f"The teacher is {opened.manifest.model_name}, not the base: step 0 is not checked.")
    report = run(
        base,
        samples,
        opened,
        out,
        settings,
        objective,
        TrainSettings(lr, epochs, batch_size, grad_accum, seed, max_steps, log_every, top_k),
        resume,
        [TrainBar("train")],
        penalty,
        pairing,
        tell,
        note if speaks else lambda _: None,
    )
    if not speaks:
        return
    final = ", ".join(f"{name} {report.final[name]:.4f}" for name in ("ce", "kl") if name in report.final)
    click.echo(f"Trained {report.num_steps:,} steps in {report.seconds:.0f} s ({final}, nats a position): {out}")


def _check_no_adapter(load_in: str | None) -> None:
    """Raise `click.UsageError` for what belongs to an adapter, on the line or in the --config file."""
    ctx = click.get_current_context()
    for name in ADAPTERS_OWN:
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            flag = name.replace("_", "-")
            raise click.UsageError(f"--{flag} has no place in --adapter none, which trains every weight. Leave it out.")
    if load_in is not None:
        raise click.UsageError(
            f"--load-in {load_in} with --adapter none: quantised weights cannot be trained. Give an adapter."
        )
