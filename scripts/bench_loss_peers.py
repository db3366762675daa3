"""The other projects that scripts/bench_loss.py measures beside ours, each as it is installed.

Owns the list: which package and environment (scripts/make-peers makes them), which quantity. What is called is in
peer_losses.py. What no index serves is written here, and says so. Whether a method runs on a device is asked of it, and
its refusal is kept word for word. bench_loss.py runs this once a measurement, by the interpreter of the environment.
Must not import `logitcache`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peer_losses as of
import torch
from bench_common import ROOT, ran_out, set_up, version_of
from bench_loss_step import QUANTITIES, Inputs, Loss, definition, load_inputs, measure_step

MOST_SAID = 160


@dataclass(frozen=True)
class Home:
    """packages: as an index calls them, none where a peer is `written`; venv: what has them, '' where it is ours."""

    packages: tuple[str, ...] = ()
    venv: str = ""
    written: str = "here"

    @property
    def python(self) -> Path:
        """The environment's interpreter; this one where it was not made."""
        found = ROOT / self.venv / "bin" / "python"
        return found if self.venv and found.exists() else Path(sys.executable)

    def says(self) -> str:
        """The versions that this process would import, or who wrote it."""
        if not self.packages:
            return f"written {self.written}"
        return ", ".join(version_of(name) for name in dict.fromkeys((*self.packages, "torch")))


@dataclass(frozen=True)
class Peer:
    """name; loss_of: imports the project, and gives the step on these inputs; quantity: of `QUANTITIES`; copies:
    tensors of [N, V] alive at its peak, about, to tell beforehand where memory will not do; compiles: by torch.compile,
    when first called; shifts: labels, by itself, so that the last position has none."""

    name: str
    loss_of: Callable[[Inputs], Loss]
    quantity: str
    copies: int
    home: Home
    compiles: bool = False
    shifts: bool = False

    def expected(self, inputs: Inputs) -> tuple[float, torch.Tensor]:
        """Loss and gradient by definition."""
        if self.shifts:
            labels = inputs.labels.clone()
            labels[-1] = -100
            inputs = replace(inputs, labels=labels)
        return definition(inputs, *QUANTITIES[self.quantity])


HERE, DISTILLKIT, TORCH = Home(), Home(written="here from distillkit bf942070 and a61c2e7d"), Home(("torch",))
LIGER, CUT, TRL, TORCHTUNE = (
    Home((name,), ".venv-peers") for name in ("liger-kernel", "cut-cross-entropy", "trl", "torchtune")
)
AXOLOTL = Home(("axolotl", "liger-kernel"), ".venv-peers-axolotl")
UNSLOTH = Home(("unsloth-zoo",), ".venv-peers-unsloth")


def _torch(name: str, **options: Any) -> Peer:
    loss_of = partial(of.torch_linear_cross_entropy, options=options)
    return Peer(f"torch linear_cross_entropy, {name}", loss_of, "CE", 1, TORCH)


def _liger(beta: float, compiled: bool) -> Peer:
    name = f"Liger chunked JSD + CE, beta {beta:g}" + ("" if compiled else ", compiled=False")
    quantity, copies = ("CE + JSD", 8) if beta else ("CE + full KL", 6)
    loss_of = partial(of.liger_chunked_jsd, beta=beta, compiled=compiled)
    return Peer(name, loss_of, quantity, copies, LIGER, compiled)


def _axolotl(compiled: bool) -> Peer:
    name = "axolotl top-k KL + CE" + ("" if compiled else ", compiled=False")
    loss_of = partial(of.axolotl_top_k, compiled=compiled)
    return Peer(name, loss_of, "CE + top-k KL, both renormalised", 4, AXOLOTL, compiled, shifts=True)


def _divergences(name: str, loss_of: Callable[..., Loss], copies: tuple[int, int], home: Home) -> list[Peer]:
    """Without cross-entropy: beta 0 and 0.5."""
    kl = Peer(f"{name}, beta 0", partial(loss_of, beta=0.0), "full KL", copies[0], home)
    return [kl, Peer(f"{name}, beta 0.5", partial(loss_of, beta=0.5), "JSD", copies[1], home)]


_COMPILED_CUT = partial(of.cut_cross_entropy, impl="torch_compile")
_BOTH, _ZERO = "CE + top-k KL, both renormalised", "CE + top-k KL, zero tail"
PEERS = (
    Peer("plain CE", of.plain_cross_entropy, "CE", 3, HERE),
    Peer("torch linear_cross_entropy, options=None", of.torch_linear_cross_entropy, "CE", 3, TORCH),
    _torch("options by default"),
    _torch("128 rows", batch_chunk_size=128),
    _torch("128 rows, accurate", batch_chunk_size=128, acc_policy="accurate"),
    Peer("Liger scaled CE", of.liger_scaled, "CE", 2, LIGER),
    Peer("Liger fused linear CE", of.liger_fused_linear, "CE", 1, LIGER),
    Peer("cut-cross-entropy", of.cut_cross_entropy, "CE", 1, CUT),
    Peer("cut-cross-entropy, impl=torch_compile", _COMPILED_CUT, "CE", 3, CUT, compiles=True),
    Peer("TRL fused LM head", partial(of.trl_fused_head, outputs=("log_probs",)), "CE", 2, TRL),
    Peer("TRL fused LM head, as SFTTrainer", of.trl_fused_head, "CE", 2, TRL),
    Peer("axolotl chunked CE", of.axolotl_chunked, "CE", 3, AXOLOTL, compiles=True),
    Peer("unsloth fused CE", of.unsloth_fused, "CE", 2, UNSLOTH),
    Peer("CE + KL, live full logits", of.live_full_kl, "CE + full KL", 8, HERE),
    Peer("torchtune chunked forward KL + CE", of.torchtune_chunked_kl, "CE + full KL + H(p)", 7, TORCHTUNE),
    *(_liger(beta, compiled) for beta in (0.0, 0.5) for compiled in (True, False)),
    *(_axolotl(compiled) for compiled in (True, False)),
    Peer("DistillKit sparse KL + CE", of.distillkit_sparse_kl, _ZERO, 6, DISTILLKIT),
    Peer("bare slices of 128", of.bare_slices, _BOTH, 1, HERE),
    *_divergences("TRL chunked divergence", of.trl_chunked_divergence, (4, 5), TRL),
    *_divergences("TRL generalized_jsd_loss", of.trl_generalized_jsd, (8, 16), TRL),
    Peer("Liger fused linear KL", of.liger_fused_kl, "full KL", 2, LIGER),
    Peer("Liger fused linear JSD, beta 0.5", of.liger_fused_jsd, "JSD", 1, LIGER),
    *_divergences("unsloth fused linear JSD", of.unsloth_jsd, (4, 4), UNSLOTH),
)
"""The first is what the others are compared with."""


def child(job: dict[str, Any]) -> dict[str, Any]:
    """`measure_step` of the job's peer, and by whom it is; or what it says where it does not run."""
    set_up(job["threads"])
    peer = next(peer for peer in PEERS if peer.name == job["method"])
    inputs, tiny = (load_inputs(Path(job[name]), job["device"]) for name in ("inputs", "tiny"))
    by = {"by": peer.home.says()}
    try:
        return by | measure_step(job, inputs, tiny, peer.loss_of, peer.expected, peer.compiles)
    except Exception as error:  # without a package, a compiler or a GPU, each project raises what it likes
        if isinstance(error, torch.OutOfMemoryError) or ran_out(str(error)):
            raise
        return by | {"refused": said(error)}


def said(error: Exception) -> str:
    """Its kind and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:MOST_SAID]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=json.loads, required=True, help="as bench_loss.py gives it")
    print(json.dumps(child(parser.parse_args().job)))
