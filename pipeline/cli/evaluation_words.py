"""What an evaluation while training found, in words."""

from collections.abc import Mapping


def evaluation_words(found: Mapping[str, float]) -> str:
    """As `evaluation.held_out.Probes.measured` names it."""
    words = [f"new CE {found['new_ce']:.4f}"] if "new_ce" in found else []
    if "prior_kl" in found:
        words += [f"prior KL {found['prior_kl']:.4f}", f"prior CE {found['prior_ce']:.4f}"]
        words.append(f"{found['prior_first_changed']:,.0f} first tokens changed")
    return ", ".join(words)
