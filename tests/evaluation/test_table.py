"""The table of an evaluation: what it leads with, which text it names, and the sentence that it ends with."""

from logitcache.evaluation.metrics import Comparison, Metrics
from logitcache.evaluation.table import closing_sentence, evaluation_rows

BEFORE = Metrics(900, 4.0, 0.3)


def moved(kl: float, change: float, flips: int, **more: object) -> Comparison:
    """A comparison of 200 documents."""
    facts = {"num_documents": 200, "intervals": {"kl": (0.005, 0.009), "first_changed": (0.0, 0.035)}, **more}
    return Comparison(BEFORE, Metrics(900, 4.0 + change, 0.2), kl, 3.5 + kl, 0.97, flips, **facts)  # type: ignore[arg-type]


def test_prior_text_leads_with_the_distance_from_the_base_and_new_text_with_its_cross_entropy() -> None:
    rows = evaluation_rows({"prior": moved(0.0071, 0.002, 3), "new": moved(0.2, -0.3154, 90)})
    names = [row[0] for row in rows]
    prior = [name.removeprefix("prior: ") for name in names if name.startswith("prior: ")]
    assert prior[:4] == [
        "KL(base || adapted), nats a token",
        "first token changed, of 200 documents",
        "same first token as the base at all positions, %",
        "cross-entropy, nats a token",
    ]
    assert names.index("new: cross-entropy, nats a token") < names.index("new: KL(base || adapted), nats a token")
    assert sorted(prior) == sorted(name.removeprefix("new: ") for name in names if name.startswith("new: "))
    cells = {row[0]: row[1:] for row in rows}
    assert cells["prior: KL(base || adapted), nats a token"] == ["0", "0.007", "0.007", "0.005 to 0.009"]
    assert cells["prior: first token changed, of 200 documents"] == ["0", "3", "3", "0 to 7"]


def test_the_text_is_named() -> None:
    rows = evaluation_rows({"prior": moved(0.1, 0.0, 0)}, texts={"prior": "prior.jsonl"})
    assert rows[-1][0] == "prior: positions in 200 documents of prior.jsonl"


def test_one_sentence_closes_the_table() -> None:
    texts = {"prior": "prior.jsonl", "new": "new.jsonl"}
    prior, new = moved(0.0071, 0.002, 3), moved(0.2, -0.3154, 90)
    forgot = "forgot 0.007 nats a token on prior.jsonl (KL to the base; cross-entropy +0.002)"
    both = closing_sentence({"prior": prior, "new": new}, texts)
    assert both == f"Learnt 0.315 nats a token on new.jsonl; {forgot}; 3 of 200 first tokens changed."
    assert closing_sentence({"prior": prior}, texts) == f"F{forgot[1:]}; 3 of 200 first tokens changed."
    assert closing_sentence({"new": new}, texts) == "Learnt 0.315 nats a token on new.jsonl."
    assert closing_sentence({"new": new}) == "Learnt 0.315 nats a token on new text."


def test_what_a_cache_leaves_open_is_told() -> None:
    cached = moved(0.0071, 0.002, 3, before_from="cache", num_first_undecided=2, undecided=0.01)
    said = closing_sentence({"prior": cached}, {"prior": "the cache prior"})
    assert said.startswith("Forgot at least 0.007 nats a token on the cache prior")
    assert said.endswith("3 of 200 first tokens changed, 2 left open by the cache's rounding.")
    cells = {row[0]: row[1:] for row in evaluation_rows({"prior": cached})}
    assert cells["prior: KL(base || adapted), nats a token, at least"][1] == "0.007"
    assert cells["prior: the same of the first of a document, documents"][1] == "2"


def test_the_base_alone_has_learnt_and_forgotten_nothing() -> None:
    alone = {"prior": Comparison(BEFORE, num_documents=200)}
    assert closing_sentence(alone).startswith("The base alone was measured.")
    assert [row[0] for row in evaluation_rows(alone)[1:]] == [
        "prior: cross-entropy, nats a token",
        "prior: perplexity",
        "prior: token accuracy, %",
        "prior: positions in 200 documents",
    ]
