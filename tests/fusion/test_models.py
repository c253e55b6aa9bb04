"""Models and losses by the spec's names."""

from __future__ import annotations

import pytest
import torch

from fusion.errors import UserError
from fusion.models import build_loss, build_model
from fusion.spec_file import spec_from

SMALL = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 32}


def spec(model: dict, loss: object = "model", **train):
    return spec_from(
        {
            "model": model,
            "loss": loss,
            "data": {"text": "a.txt"},
            "train": {"steps": 1, "global_batch": 1, **train},
        }
    )


def test_the_seed_decides_the_weights(tmp_path):
    (tmp_path / "m.py").write_text(
        "import torch\ndef build(size=2):\n    return torch.nn.Linear(size, size).eval()\n"
        "def other():\n    return 3\ndef loss(output, targets):\n    return output.sum()\n"
    )
    first, again, other = (
        build_model(spec({"entrypoint": "m.py:build"}, seed=seed), tmp_path).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    assert build_model(spec({"entrypoint": "m.py:build", "args": {"size": 5}}), tmp_path).training
    with pytest.raises(UserError, match=r"returned a int; return a torch.nn.Module"):
        build_model(spec({"entrypoint": "m.py:other"}), tmp_path)
    assert build_loss(spec({"hf": "gpt2"}), tmp_path) == "model"
    assert build_loss(spec({"hf": "gpt2"}, {"entrypoint": "m.py:loss"}), tmp_path).__name__ == "loss"


def test_transformers(tmp_path):
    pytest.importorskip("transformers")
    model = build_model(spec({"hf": "gpt2", "config": SMALL}), tmp_path)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.training
    assert not model.config.use_cache
    eager = build_model(spec({"hf": "gpt2", "config": {**SMALL, "attn_implementation": "eager"}}), tmp_path)
    assert eager.config._attn_implementation == "eager"
    bert = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 32,
    }
    assert type(build_model(spec({"hf": "bert", "config": bert}), tmp_path)).__name__ == "BertForMaskedLM"
    named = {**bert, "architectures": ["BertForSequenceClassification"]}
    assert (
        type(build_model(spec({"hf": "bert", "config": named}), tmp_path)).__name__ == "BertForSequenceClassification"
    )
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sides = ("layers", "ffn_dim", "attention_heads")
    speech = {"d_model": 8, **{f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in sides}}
    speech |= {"vocab_size": 32, "pad_token_id": 0, "max_source_positions": 8, "max_target_positions": 8}
    for kind, config, expected in (
        ("deit", tower, "DeiTForImageClassification"),
        ("whisper", speech, "WhisperForConditionalGeneration"),
        ("audio-spectrogram-transformer", tower, "ASTForAudioClassification"),
        ("videomae", {**tower, "image_size": 16, "decoder_num_hidden_layers": 1}, "VideoMAEForVideoClassification"),
    ):
        assert type(build_model(spec({"hf": kind, "config": config}), tmp_path)).__name__ == expected
    for model_spec, message in (
        ({"hf": "gtp2"}, "has no model type 'gtp2'; did you mean 'gpt2'"),
        ({"hf": "gpt2", "config": {**SMALL, "n_head": 3}}, "can't be made from this config"),
        ({"hf": "bert", "config": {**bert, "architectures": ["Nope"]}}, "has no class 'Nope'"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(spec(model_spec), tmp_path)


def test_settings_of_transformers(tmp_path):
    """A config keeps whatever it is given: a misspelt setting must not become the default's model."""
    pytest.importorskip("transformers")
    llama = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 32,
    }
    renamed = build_model(spec({"hf": "llama", "config": {**llama, "rope_theta": 5.0}}), tmp_path)
    assert renamed.config.rope_parameters["rope_theta"] == 5.0
    without_default = build_model(spec({"hf": "qwen2", "config": {**llama, "head_dim": 6}}), tmp_path)
    assert without_default.model.layers[0].self_attn.head_dim == 6
    for config, message in (
        ({"num_hidden_layer": 1}, "llama has no setting 'num_hidden_layer'; did you mean 'num_hidden_layers'?"),
        ({"zzz": 1}, "llama has no setting 'zzz'; leave it out"),
        ({"vocab_size": "many"}, "Validation error for field 'vocab_size': .*expected int, got str"),
    ):
        with pytest.raises(UserError, match=message) as told:
            build_model(spec({"hf": "llama", "config": {**llama, **config}}), tmp_path)
        assert "\n" not in str(told.value)
