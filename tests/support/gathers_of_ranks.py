"""What FSDP2 gathers of a small Llama in a step, by two gloo ranks; run by test_fsdp.py, prints JSON on rank 0.

{"forward", "backward": parts in the order in which they are asked for, "after forward", "after backward", "after
reshard": layers whose weights are whole then}.
"""

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem.training import fsdp, models, parallel
from lowmem.training.heads import Head


def asked_for(profiler):
    """The parts, by FSDP2's own labels."""
    labels = [(event.time_range.start, event.name) for event in profiler.events() if "FSDP::all_gather (" in event.name]
    return [re.search(r"\((.*)\)", name)[1] for _, name in sorted(labels) if "layers" in name]


def whole():
    return [k for k, layer in enumerate(lm.layers) if not any(parallel.is_sharded(p) for p in layer.parameters())]


dist.init_process_group("gloo")
torch.manual_seed(0)
size = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, vocab_size=32, **size))
lm = models.CausalLM(network, Head(network), models.choose_trained(network, "layers"), nullcontext)
models.checkpoint_activations(network)
fsdp.shard(lm, torch.device("cpu"), torch.float32)
ids, found = torch.arange(8)[None], {}
for _ in range(2):  # FSDP2 starts itself in the first
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found["after forward"] = whole()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
        hidden.square().sum().backward()
    found["after backward"] = whole()
with torch.no_grad():
    network.base_model(input_ids=ids, use_cache=False)
parallel.reshard(network)
found |= {"after reshard": whole(), "forward": asked_for(forward), "backward": asked_for(backward)}

if parallel.rank() == 0:
    print(json.dumps(found))
parallel.wait_for_all()
