"""Names that the libraries do not promise, each used in one place: a test that says which has moved.

python -m pytest tests/test_private_names.py
"""

import datetime
import importlib.util
import inspect

import pytest
import torch
import transformers
from support.tiny import make_model


def test_of_transformers():
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    from transformers.utils import chat_template_utils
    from transformers.utils.chat_template_utils import render_jinja_template

    assert chat_template_utils.datetime is datetime.datetime  # data/chat.py
    names = {"conversations", "tools", "chat_template", "return_assistant_tokens_mask"}
    assert names <= inspect.signature(render_jinja_template).parameters.keys()  # data/chat.py
    assert list(inspect.signature(load_offloaded_parameter).parameters)[:2] == ["model", "param_name"]  # saved_model.py
    assert "fp8" in AUTO_QUANTIZATION_CONFIG_MAPPING  # source.py
    model = make_model()
    assert model.config._attn_implementation == "sdpa"  # cuda_graphs.py
    assert model.supports_gradient_checkpointing  # models.py
    assert isinstance(model.config.attribute_map, dict)  # saved_model.py
    assert isinstance(transformers.Gemma3Config.sub_configs, dict)  # saved_model.py
    known = inspect.signature(transformers.AttentionMaskInterface()["sdpa"]).parameters
    assert "allow_is_causal_skip" in known  # cuda_graphs.py


def test_of_torch(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(tmp_path))  # checkpoint.py
    with writer.fs.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
    moved = torch.nn.Linear(1, 1)._apply(lambda tensor: tensor + 1)  # fsdp.py
    assert isinstance(moved, torch.nn.Linear)


def test_of_cut_cross_entropy():
    if importlib.util.find_spec("cut_cross_entropy") is None:
        pytest.skip("not installed")
    from cut_cross_entropy.cce import CCEParams, linear_cross_entropy_apply  # linear_cross_entropy.py

    assert list(inspect.signature(linear_cross_entropy_apply).parameters) == ["e", "c", "params"]
    names = ["targets", "valids", "softcap", "reduction", "filter_eps", "shift", "batch_shape"]
    assert list(inspect.signature(CCEParams).parameters) == names
