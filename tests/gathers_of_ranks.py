"""What FSDP2 gathers of a small Llama in a step, by several gloo ranks; run by test_ranks.py, prints JSON on rank 0.

{layers that stay gathered: {"forward", "backward": parts in the order in which they are asked for, "after forward",
"after reshard", "after backward": layers whose weights are whole then}}.
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import common


def asked_for(profiler):
    """The parts, by FSDP2's own labels."""
    labels = [(event.time_range.start, event.name) for event in profiler.events() if "FSDP::all_gather (" in event.name]
    return [re.search(r"\((.*)\)", name)[1] for _, name in sorted(labels) if "layers" in name]


def whole(model):
    layers = enumerate(common.decoder_layers(model))
    return [k for k, layer in layers if not any(common.is_sharded(p) for p in layer.parameters())]


dist.init_process_group("gloo")
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=16,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
found = {}
for kept in (0, 1, 3):
    model = LlamaForCausalLM(config)
    trained = common.choose_trained(model, "layers")
    common.checkpoint_activations(model)
    common.shard(model, trained, torch.device("cpu"), torch.float32)
    common.keep_gathered(model, kept)
    ids, seen = torch.arange(8)[None], {}
    for _ in range(2):  # FSDP2 starts itself in the first
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        seen["after forward"] = whole(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
            hidden.square().sum().backward()
        seen["after backward"] = whole(model)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    assert whole(model) == seen["after forward"]
    common.reshard(model)
    found[kept] = seen | {"after reshard": whole(model), "forward": asked_for(forward), "backward": asked_for(backward)}

if common.rank() == 0:
    print(json.dumps(found))
common.wait_for_all()
