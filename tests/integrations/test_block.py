"""What a framework's configuration may say of the cache: every setting by its name, and nothing else."""

from typing import Any

import pytest

from logitcache import AnchorSettings, CaptureSettings, InvalidSettings, Objective, PairingRules
from logitcache.integrations.block import read_block


def test_every_setting_is_a_key_and_reaches_the_trainer() -> None:
    block = read_block(
        {
            **{"cache": "c/", "fill": True, "top_k": 8, "check": False, "kl_budget": "2e-2", "weight": "1e-1"},
            "teacher_is_not_base": True,
            "capture": {"top_k": 32, "precision": "exact"},
            "anchors": [{"cache": "a/", "weight": 2, "regularizer": "masked-kl"}, {"cache": "b/"}],
        },
        "logitcache",
    )
    said = block.keywords()
    anchors = [(anchor.cache, anchor.settings) for anchor in said.pop("anchor")]
    assert anchors == [("a/", AnchorSettings(weight=2.0, regularizer="masked-kl")), ("b/", AnchorSettings())]
    assert said == {
        **{"cache": "c/", "fill": True, "top_k": 8, "check": False},
        "objective": Objective(weight=0.1, kl_budget=0.02),  # of texts, as YAML 1.1 reads 2e-2
        "rules": PairingRules(teacher_is_not_base=True),
        "capture": CaptureSettings(top_k=32, precision="exact"),
    }


def test_what_is_left_out_has_the_defaults_of_the_trainer() -> None:
    said = read_block({"cache": "c/", "weight": None}, "logitcache").keywords()
    assert said == {
        **{"cache": "c/", "fill": False, "top_k": None, "check": True, "capture": None, "anchor": []},
        **{"objective": Objective(), "rules": PairingRules()},
    }


def test_a_loss_that_reads_no_cache_needs_none() -> None:
    assert read_block({"regularizer": "none"}, "logitcache").keywords()["cache"] is None


REFUSED: list[tuple[Any, str]] = [
    ("cache/", "logitcache: expected a mapping of names and values, found 'cache/'"),
    ({"cache": "c/", "wieght": 2}, "logitcache: unknown key 'wieght'. Known keys: .*weight"),
    ({"cache": "c/", "capture": {"topk": 2}}, "logitcache.capture: unknown key 'topk'"),
    ({"cache": "c/", "capture": True}, "logitcache.capture: expected a mapping"),
    ({"cache": "c/", "anchors": "a/"}, "logitcache.anchors: expected a list, found 'a/'"),
    ({"cache": "c/", "anchors": [{"weight": 2}]}, r"logitcache.anchors\[0\]: expected cache"),
    ({"cache": "c/", "anchors": [{"cache": "a/", "wieght": 2}]}, r"logitcache.anchors\[0\]: unknown key 'wieght'"),
    ({"cache": "c/", "weight": "much"}, "logitcache.weight: expected a number.*found 'much'"),
    ({"cache": "c/", "weight": -1}, "weight: expected a number of 0 or more, found -1"),
    ({"cache": "c/", "fill": "yes"}, "fill: expected true or false, found 'yes'"),
    ({"cache": "c/", "regularizer": "none", "kl_budget": 0.1}, "kl-budget needs a KL"),
    ({"fill": True}, "logitcache: expected cache, the path of one, as masked-kl reads it"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_what_is_no_setting_is_refused_by_name(values: Any, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said) as caught:
        read_block(values, "logitcache")
    assert caught.value.reason == "invalid-settings"
