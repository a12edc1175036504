"""A causal LM to train: what of it trains, its hidden states and log-probabilities, its checks."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lowmem.training import heads, memory, parallel, source, weights
from lowmem.training.batches import Batch
from lowmem.training.data import Data
from lowmem.training.errors import UserError, refuse_what_fails


@dataclass
class CausalLM:
    """A causal LM of transformers, its head, its trained parameters by name, and the context of each forward pass.

    head_stays: whether the loss needs the head's weights on the device as a whole.
    """

    network: torch.nn.Module
    head: heads.Head
    trained: dict[str, torch.nn.Parameter]
    precision: Callable[[], AbstractContextManager]
    head_stays: bool = False

    @property
    def name(self) -> str:
        """Name of the architecture's class."""
        return type(self.network).__name__

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder layers."""
        return decoder_layers(self.network)

    @property
    def device(self) -> torch.device:
        """Where what is trained is."""
        return next(iter(self.trained.values())).device

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.trained.values())

    @property
    def total_parameters(self) -> int:
        """Number of all parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def logits(self, batch: Batch) -> torch.Tensor:
        """[rows, length, vocabulary], as the model itself makes them."""
        with self.precision():
            return self.network(**batch.inputs(), use_cache=False).logits

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """[n, width]: the last hidden state at the positions that predict the batch's n targets."""
        with self.precision():
            hidden = self.network.base_model(**batch.inputs(), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch.indices]

    def score_targets(self, batch: Batch) -> torch.Tensor:
        """fp32 [n, 2]: of each target of the batch its log-probability, and 1 where no token is likelier, else 0.

        Logits are made for targets only, in blocks.
        """
        scores = self.head.score_targets(self.hidden_states(batch), batch.targets)
        parallel.reshard(self.network)
        return scores

    def check(self, data: Data, cross_entropy: Callable[..., torch.Tensor] | None = None) -> None:
        """Refuse a model that is not causal, or whose own loss differs from evaluation's or from `cross_entropy`.

        cross_entropy: function (head, hidden [n, width], targets [n], weights [n]) -> loss. Raises UserError.
        """
        batch = data.small().to(self.device)
        check_causal(self, data, batch)
        losses = {"evaluation": lambda hidden: -self.head.score_targets(hidden, batch.targets)[:, 0].mean()}
        if cross_entropy:
            losses["cross entropy"] = lambda hidden: cross_entropy(self.head, hidden, batch.targets, batch.weights)
        with torch.no_grad(), mode(self.network, training=False), self.precision():
            heads.check_head(self.network, self.head, batch, losses)

    def uses_rng_in_forward(self, batch: Batch) -> bool:
        """Whether a training pass draws random numbers (dropout, noise), by the random state before and after one."""
        state = torch.cuda.get_rng_state if batch.ids.is_cuda else torch.get_rng_state
        before = state()
        with torch.no_grad(), mode(self.network, training=True), self.precision():
            self.network.base_model(**batch.inputs(), use_cache=False)
        return not torch.equal(before, state())


def load(
    name: str, dtype: torch.dtype, trained: str, precision: Callable[[], AbstractContextManager], stand_in: bool = False
) -> CausalLM:
    """The causal LM `name` (hub id or folder) with weights of `dtype`, in host memory. Raises UserError.

    trained: see `choose_trained`. stand_in: whether no weights are read: random ones of what `layers_to_measure` says
    stand for all.
    """
    network = weights.stand_in(name, dtype) if stand_in else weights.load(name, dtype)
    if stand_in:
        with first_layers(network, layers_to_measure(network)):
            weights.randomise(network)
    chosen = choose_trained(network, trained)
    if parallel.world_size() == 1:  # of several ranks `fsdp.shard` does that
        for p in chosen.values():  # transformers has routers in fp32 from 5.24 on, whatever their files hold
            p.data = p.data.to(dtype)
    return CausalLM(network, heads.Head(network), chosen, precision)


def require_room(name: str, dtype: torch.dtype) -> None:
    """Raise UserError if the weights of `name`, as `dtype`, do not fit into the host's free memory."""
    if parallel.world_size() == 1:  # of several ranks, each reads and converts its part
        network, _ = source.empty_model(name, dtype)
        memory.require_host_memory(memory.size_in_bytes(network.parameters()), f"{name} in {dtype}")


def decoder_layers(network: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers. Raises UserError if the architecture has none that can be found.

    Of a model of pictures and text those of the text: `get_decoder` leads past the other towers.
    """
    depth = network.config.get_text_config().num_hidden_layers
    for module in [*network.get_decoder().modules(), *network.base_model.modules()]:
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"{type(network).__name__} is not supported: its decoder layers cannot be found")


def streamable_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers that can stream: the largest group with parameters alike, none of which another layer has too.

    Others, as a first layer without experts, stay.
    """
    layers = decoder_layers(network)
    uses = Counter(p for layer in layers for p in layer.parameters())
    shapes = [[(p.shape, p.dtype) for p in layer.parameters()] for layer in layers]
    group = max(shapes, key=lambda own: shapes.count(own) * sum(shape.numel() for shape, _ in own), default=None)
    alike = [layer for layer, own in zip(layers, shapes, strict=True) if own == group]
    return [layer for layer in alike if all(uses[p] == 1 for p in layer.parameters())]


def layers_to_measure(network: torch.nn.Module) -> int:
    """How many first decoder layers show what a step takes: among them two that can stream, and one of each kind."""
    layers, alike = list(decoder_layers(network)), streamable_layers(network)
    kinds = [[type(module) for module in layer.modules()] for layer in layers]
    return 1 + max([kinds.index(kind) for kind in kinds] + [layers.index(layer) for layer in alike[:2]])


@contextmanager
def first_layers(network: torch.nn.Module, count: int) -> Iterator[torch.nn.ModuleList]:
    """In this context the model has its first `count` decoder layers only; yields them."""
    layers, config = decoder_layers(network), network.config.get_text_config()
    others = list(layers)[count:]
    del layers[count:]
    config.num_hidden_layers = len(layers)
    try:
        yield layers
    finally:
        layers.extend(others)
        config.num_hidden_layers = len(layers)


def windows_below(network: torch.nn.Module, longest: int) -> set[int]:
    """The windows of attention, in tokens, of the model's layers, that are smaller than `longest`.

    Also those of layers that are not there now (`first_layers`).
    """
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    windows = {getattr(config, "sliding_window", None)} if "sliding_attention" in kinds else set()
    windows |= {getattr(config, "attention_chunk_size", None)}
    return {window for window in windows if window is not None and window < longest}


def require_one_rotation(network: torch.nn.Module, longest: int) -> None:
    """Refuse rows so long that the model would turn all of a batch by other angles (LongRoPE, Ding et al. 2024)."""
    config = network.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # of all layers, or of each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            limit = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest > limit:
                raise UserError(
                    f"the longest row has {longest:,} tokens, and a row of more than {limit:,} changes how this model "
                    f"reads the rows beside it (LongRoPE): take --max_length {limit}"
                )


def choose_trained(network: torch.nn.Module, trained: str) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of what --trained ("layers" or "all") means, a tied weight once; sets requires_grad.

    All are those that text reaches: not a tower for pictures. Raises UserError.
    """
    network.requires_grad_(False)
    parts = [decoder_layers(network)]
    if trained == "all":
        parts += [network.get_decoder(), network.get_input_embeddings(), network.get_output_embeddings()]
    for part in filter(None, parts):
        part.requires_grad_(True)
    settings, architecture = network.config.get_text_config(decoder=True).to_dict(), type(network).__name__
    if skipping := [setting for setting in ("layerdrop", "decoder_layerdrop") if settings.get(setting)]:
        raise UserError(
            f"{architecture} is not supported while it skips layers at random: set {' and '.join(skipping)} to 0 in "
            "its config.json"
        )
    chosen = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not chosen:
        raise UserError(f"{architecture} has no decoder layers, so there is nothing to train")
    return chosen


class Checkpointed:
    """A decoder layer whose call runs again in backward, hooks included, instead of keeping activations.

    The hooks bring weights: FSDP2's, and those of layers that stream. transformers leaves them out from 5.23 on.
    """

    def __call__(self, *args, **kwargs):
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, **self.checkpoint_options, **kwargs)


@functools.cache
def _checkpointed(layer_class):  # one class for all layers of a kind, or each would be compiled anew
    return type(layer_class.__name__, (Checkpointed, layer_class), {})


def checkpoint_activations(network: torch.nn.Module, **options) -> None:
    """Turn on gradient checkpointing of each decoder layer (Chen et al. 2016), and training mode. Raises UserError.

    options: of torch.utils.checkpoint. May be called again, with others.
    """
    if not network.supports_gradient_checkpointing:
        raise UserError(f"{type(network).__name__} is not supported: it does not allow gradient checkpointing")
    layers = decoder_layers(network)
    if not any(isinstance(layer, Checkpointed) for layer in layers):
        network.enable_input_require_grads()  # so that the first layer has a graph as the others
    for layer in layers:
        if not isinstance(layer, Checkpointed):
            layer.__class__ = _checkpointed(type(layer))
        layer.checkpoint_options = options
    network.train()


@contextmanager
def mode(network: torch.nn.Module, training: bool) -> Iterator[None]:
    """In this context the network is in training mode or in the other, at its end in the one before."""
    before = network.training
    network.train(training)
    try:
        yield
    finally:
        network.train(before)


def check_ids(lm: CausalLM, data: Data) -> None:
    """Refuse data with ids that the model has no embedding for, before any are looked up. Raises UserError."""
    largest, size = data.largest_id(), lm.network.get_input_embeddings().num_embeddings
    if largest >= size:
        raise UserError(
            f"the tokenizer gives ids up to {largest} where {lm.name} knows {size}: they do not belong together"
        )


def check_causal(lm: CausalLM, data: Data, batch: Batch) -> None:
    """Refuse a model whose decoder layers do not all run on text, or in which a position sees later ones, and so its
    answer, or another row. Raises UserError.

    Padded rows have no mask: causality alone makes that right.
    """
    network = lm.network
    changed, same = change_first_row(batch, network)
    idle = set(lm.layers)
    handles = [layer.register_forward_pre_hook(lambda layer, *_: idle.discard(layer)) for layer in idle]
    with refuse_what_fails(network), torch.no_grad(), lm.precision():
        with mode(network, training=False):
            before, after = (
                network.base_model(**b.inputs(), use_cache=False).last_hidden_state.flatten(0, 1)[same].float()
                for b in (batch, changed)
            )
        with mode(network, training=True):
            network.base_model(**batch.inputs(), use_cache=False)  # dropout may fail
    for handle in handles:
        handle.remove()
    if idle:
        raise UserError(f"{lm.name} is not supported: what is taken for its decoder layers does not all run on text")
    # equal shapes run the same kernels; 1 % leaves room for those whose sums run in another order
    if (before - after).norm() > 0.01 * before.norm():
        raise UserError(
            f"{lm.name} is not supported: it is not causal, a token changes what comes before it or another row"
        )


def change_first_row(batch: Batch, network: torch.nn.Module) -> tuple[Batch, torch.Tensor]:
    """(the batch with other tokens in the second half of its first row, flat indices of all positions but those)."""
    ids, end = batch.ids.clone().flatten(), batch.ids.shape[1]
    if batch.row_starts is not None:
        end = batch.row_starts[1].item()
    ids[end // 2 : end] = (ids[end // 2 : end] + 1) % network.get_input_embeddings().num_embeddings
    same = torch.cat([torch.arange(end // 2), torch.arange(end, len(ids))]).to(ids.device)
    return replace(batch, ids=ids.view_as(batch.ids)), same


class Fp32Products(TorchFunctionMode):
    """Matrix products of bf16 tensors in fp32, results in bf16 again.

    For CPUs: without bf16 instructions torch's bf16 products run at 1 to 20 GFLOP/s on two cores where fp32 ones run at
    50 to 130 (EPYC of the Zen 3 family, torch 2.13). Weights and activations stay bf16.
    """

    PRODUCTS = {
        F.linear, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm,
        torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.addmm, torch.baddbmm, torch.Tensor.baddbmm,
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or not any(_is_bf16(x) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args = [x.float() if _is_bf16(x) else x for x in args]
        kwargs = {name: x.float() if _is_bf16(x) else x for name, x in kwargs.items()}
        return func(*args, **kwargs).bfloat16()


def _is_bf16(x):
    return torch.is_tensor(x) and x.dtype == torch.bfloat16
