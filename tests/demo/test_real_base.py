"""From a packed Llama to a checkpoint: the same numbers, no trace of the packing, whole or not there."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.demo import real_base
from logitcache.demo.real import RealDemoSettings, run_real_demo
from logitcache.demo.real_base import FILE, MODULE, PACKAGE, WHAT, fastest_dtype, packed_model, unpack
from logitcache.errors import InputNotFound, UnsupportedModel, install_line
from logitcache.models.loading import find_model, load_base, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A tiny Llama as GGUF in float32, with a byte-level tokenizer and a chat template; its tensors by GGUF name."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab", "abc"]
    rng, size, inner, writer = np.random.default_rng(0), 16, 24, GGUFWriter(path, "llama")
    shapes = {"token_embd": (len(tokens), size), "output_norm": (size,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (size, size)
    shapes |= {"blk.0.ffn_gate": (inner, size), "blk.0.ffn_up": (inner, size), "blk.0.ffn_down": (size, inner)}
    shapes |= {"blk.0.attn_norm": (size,), "blk.0.ffn_norm": (size,)}
    tensors = {f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    writer.add_context_length(128)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_packed_llama_becomes_an_ordinary_checkpoint(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    unpack(tmp_path / "tiny.gguf", tmp_path / "base", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tiny.gguf"]
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "quantization_config" not in config and "_name_or_path" not in config and config["dtype"] == "float32"
    source = find_model(str(tmp_path / "base"))
    base = load_base(source, "auto", torch.device("cpu"))
    assert base.identity.quantization == ""
    state = base.model.state_dict()
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(state["lm_head.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(state["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down.weight"])
    tokenizer: Any = load_tokenizer(source)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>user: ab<|im_end|>"
    assert tokenizer("ab")["input_ids"] == [259]

    unpack(tmp_path / "tiny.gguf", tmp_path / "half", torch.bfloat16)
    half = load_base(find_model(str(tmp_path / "half")), "auto", torch.device("cpu")).model.state_dict()
    assert torch.equal(half["model.embed_tokens.weight"], state["model.embed_tokens.weight"].bfloat16())


def test_a_damaged_file_leaves_no_base(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModel, match=f"Install {PACKAGE} again"):
        unpack(tmp_path / "torn.gguf", tmp_path / "base", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["torn.gguf"]


@pytest.mark.parametrize("lacks", ["gguf", MODULE, FILE])
def test_what_is_not_installed_is_named_with_the_lines_that_install_it(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / MODULE / "__init__.py"
    module.parent.mkdir()
    if lacks != FILE:
        module.with_name(FILE).write_bytes(b"")
    monkeypatch.setattr(
        real_base, "find_spec", lambda name: None if name == lacks else SimpleNamespace(origin=str(module))
    )
    with pytest.raises(InputNotFound) as refusal:
        run_real_demo(tmp_path / "out", RealDemoSettings(), lambda _: None)
    assert install_line("demo-real") in str(refusal.value) and f"pip install --no-deps {PACKAGE}" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_the_script_installs_the_package_whose_file_is_read() -> None:
    script = (ROOT / "scripts" / "demo").read_text()
    assert f"--no-deps {PACKAGE}" in script and "'.[demo-real]'" in script
    assert PACKAGE.replace("==", " ") in WHAT and PACKAGE.startswith(MODULE.replace("_", "-"))


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f avx512bw", torch.float32),
        (None, torch.float32),
    ],
)
def test_bf16_is_taken_where_the_cpu_multiplies_it(said: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    if said is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{said}\n")
    assert fastest_dtype(tmp_path / "cpuinfo") is dtype


def test_the_real_base_answers(tmp_path: Path) -> None:
    """Where the package is installed: the model that the demo is on says what it is known to say."""
    if importlib.util.find_spec(MODULE) is None:
        pytest.skip("the package that carries the model, of 100 MB, is not installed")
    from logitcache.evaluation.answers import answers_of
    from logitcache.evaluation.prompts import Prompt
    from logitcache.evaluation.settings import AnswerSettings

    unpack(packed_model(), tmp_path / "base", torch.bfloat16)
    source = find_model(str(tmp_path / "base"))
    base = load_base(source, "auto", torch.device("cpu"))
    assert base.identity.vocab_size == 49_152 and base.identity.quantization == ""
    asked = Prompt(({"role": "user", "content": "What is the capital of France?"},), "the test")
    answered = answers_of(base.model, load_tokenizer(source), [asked], AnswerSettings(12, 1))
    assert answered.answers[0].text == "The capital of France is Paris."
