"""A frozen head that is dealt out to several GPUs, and NCCL's share of their memory. What is trained is dealt out by
lowmem/training/fsdp.py.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from lowmem.linear_cross_entropy import HeadInPieces
from lowmem.training import parallel
from lowmem.training.heads import HEAD_PIECE_BYTES
from lowmem.training.parallel import ceil_div

# Smaller buffers and fewer thread blocks than NCCL's own: on two H200s 0.45 GiB less on each; 8B with 32 rows as fast.
# GRAPH_MIXING_SUPPORT 0: a step's communication is all in its graph, and none is launched outside while one runs.
NCCL_SETTINGS = {
    "BUFFSIZE": 2**21, "LL_BUFFSIZE": 2**16, "LL128_BUFFSIZE": 2**17, "MAX_CTAS": 16, "GRAPH_MIXING_SUPPORT": 0,
}  # fmt: skip


def shrink_nccl() -> None:
    """Make NCCL take less of each GPU, among the processes of one machine. Read when it starts."""
    if parallel.world_size() > 1 and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        for name, value in NCCL_SETTINGS.items():
            os.environ.setdefault(f"NCCL_{name}", str(value))


class ShardedHead(HeadInPieces):
    """A head whose weights are dealt out: each rank's device has its rows of each piece, and gathers the others'.

    The next piece comes while one is used. The whole weight stays in host memory, for the embeddings and to be saved.
    """

    def __init__(self, network: torch.nn.Module, device: torch.device, piece_bytes: int = HEAD_PIECE_BYTES):
        super().__init__(network)
        (vocabulary, width), ranks = self.weight.shape, parallel.world_size()
        each = ceil_div(min(vocabulary, piece_bytes // (width * self.weight.itemsize)), ranks)
        self.piece_rows = each * ranks
        own = self.weight.new_zeros(ceil_div(vocabulary, self.piece_rows), each, width, device=device)
        for k, rows in enumerate(own):
            start = k * self.piece_rows + parallel.rank() * each
            there = self.weight.data[start : start + each]
            rows[: len(there)] = there
        self.layer.register_buffer("own_rows", own, persistent=False)
        self.buffers = own.new_empty(2, self.piece_rows, width)

    def _gather(self, k):
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        return all_gather(self.buffers[k % 2], self.layer.own_rows[k], async_op=True)

    def weight_pieces(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Yield (slice of the vocabulary, its weights on the device, its bias or None); each is used up by the next."""
        coming = self._gather(0)
        for k, (piece, on_host, bias) in enumerate(super().weight_pieces()):  # of the whole weight, in host memory
            coming.wait()
            if k + 1 < len(self.layer.own_rows):
                coming = self._gather(k + 1)
            yield piece, self.buffers[k % 2, : len(on_host)], bias
