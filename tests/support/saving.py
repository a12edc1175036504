"""Models loaded and saved as a run that trains nothing does, without the run."""

import torch

from lowmem.training import saved_model, tokenizing, weights


def loaded(model, dtype=torch.bfloat16):
    """(network, tokenizer, origin) of the model in a folder."""
    tokenizer, _ = tokenizing.load(str(model))
    return weights.load(str(model), dtype), tokenizer, saved_model.Origin.of(str(model))


def save_again(model, folder, dtype=torch.bfloat16):
    """The network and the tokenizer of the model in a folder, after they were saved in another and read back."""
    network, tokenizer, origin = loaded(model, dtype)
    saved_model.check_settings(str(model), network.config, tokenizer, origin)
    saved_model.save(folder, network, tokenizer, origin)
    saved_model.read_back(folder, network, tokenizer)
    return network, tokenizer
