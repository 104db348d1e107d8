"""Llama 3, 3.1, 3.2, 3.3 over a flat run of documents, with the parameter names of the files."""

# Shape letters: N tokens, D model, H heads, K kv heads, E head dim, V vocabulary.
# There is no batch axis and no padding: hidden states are (N, D) for any number of documents.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.model.dropout import SeededDropout
from minilora.model.linear import linear
from minilora.model.llama_shape import LlamaShape
from minilora.model.loss import CHUNK_ROWS, head_loss, head_scores
from minilora.model.offload import HostStore
from minilora.model.recompute import keep, recompute
from minilora.model.rope import rotate
from minilora.model.swiglu import swiglu
from minilora.model.tiles import MlpPiece, Tile


class Linear(nn.Module):
    """y = x W^T + b without random initialisation: the numbers come from files."""

    def __init__(self, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        empty = torch.empty(out_features) if bias else None
        self.bias = nn.Parameter(empty, requires_grad=False) if empty is not None else None

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, None, unread)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the reduction in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: (N, D) to (N, D)."""

    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        sizes, bias = shape.linear_shapes(), shape.attention_bias
        self.q_proj = Linear(*sizes["q_proj"], bias)
        self.k_proj = Linear(*sizes["k_proj"], bias)
        self.v_proj = Linear(*sizes["v_proj"], bias)
        self.o_proj = Linear(*sizes["o_proj"], bias)

    def forward(self, x: Tensor, tile: Tile) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_proj(x).unflatten(-1, heads)  # (N, H, E)
        key = self.k_proj(x).unflatten(-1, heads)  # (N, K, E)
        value = self.v_proj(x).unflatten(-1, heads)  # (N, K, E)
        query, key = rotate(query, tile.rotation), rotate(key, tile.rotation)
        attended = tile.attend(self.layer, query, key, value)  # (N, H, E)
        output: Tensor = self.o_proj(attended.flatten(1))
        return output


class MLP(nn.Module):
    """Gate, up and down projection: (N, D) to (N, D)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        sizes, bias = shape.linear_shapes(), shape.mlp_bias
        self.gate_proj = Linear(*sizes["gate_proj"], bias)
        self.up_proj = Linear(*sizes["up_proj"], bias)
        self.down_proj = Linear(*sizes["down_proj"], bias)

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        output: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)), unread)
        return output


class Block(nn.Module):
    """A decoder block: what ZeRO-3 gathers at once, what is recomputed, what loops over tiles."""

    def __init__(self, shape: LlamaShape, layer: int, keep: bool) -> None:
        super().__init__()
        self.layer, self.keep = layer, keep  # keep its activations instead of recomputing them
        self.dropout: SeededDropout | None = None
        self.store: HostStore | None = None  # of the inputs, shared by all blocks
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, hidden: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """hidden: (N, D), covered by the rows of the tiles in order. Returns (N, D)."""
        if not torch.is_grad_enabled():
            return torch.cat([self._forward_tile(hidden[tile.rows], tile) for tile in tiles])
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.keep:
            return keep(self._forward_tile, hidden, tiles, trained)
        return recompute(self._forward_tile, hidden, tiles, trained, self.store)

    def _forward_tile(self, hidden: Tensor, tile: Tile, unread: bool = False) -> Tensor:
        self._reseed(tile.seed, hidden)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), tile)
        pieces = [MlpPiece(rows, tile.seed + index) for index, rows in enumerate(tile.pieces, 1)]
        if len(pieces) == 1:
            return self._forward_mlp(hidden, pieces[0], unread)
        # Computed again piece by piece, so that only one piece's wide activations are there.
        trained = [parameter for parameter in self.mlp.parameters() if parameter.requires_grad]
        return recompute(self._forward_mlp, hidden, pieces, trained, unread=unread)

    def _forward_mlp(self, hidden: Tensor, piece: MlpPiece, unread: bool = False) -> Tensor:
        self._reseed(piece.seed, hidden)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), unread)
        return output

    def _reseed(self, seed: int, hidden: Tensor) -> None:
        """Draw the masks that belong to this block and seed, now and when computed again."""
        if self.dropout is not None:
            self.dropout.reseed((seed * 1000003 + self.layer) % 2**63, hidden.device)


class Embedding(nn.Module):
    """Token ids (N,) to rows (N, D) of a table (V, D)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        empty = torch.empty(shape.vocab_size, shape.hidden_size)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class Head(nn.Module):
    """The language-model head: hidden states to the loss, or to logits."""

    def __init__(self, shape: LlamaShape, tied_weight: nn.Parameter | None) -> None:
        super().__init__()
        if tied_weight is None:
            empty = torch.empty(shape.vocab_size, shape.hidden_size)
            tied_weight = nn.Parameter(empty, requires_grad=False)
        self.weight = tied_weight
        self.chunk_rows = CHUNK_ROWS

    def forward(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """hidden: (N, D); targets: (N,) int64. Returns the summed loss times scale, fp32.

        Without gradients: (2,) fp32, the summed loss and how many targets were the likeliest token.
        """
        weight = self.weight.to(hidden.dtype)
        if not torch.is_grad_enabled():
            return head_scores(hidden, weight, targets, self.chunk_rows)
        return head_loss(hidden, weight, targets, scale, self.chunk_rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (N, D). Returns (N, V) in the dtype of hidden."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm; holds the names under `model.` in the files."""

    def __init__(self, shape: LlamaShape, keep_blocks: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape)
        first = shape.num_layers - keep_blocks  # the last ones' activations live shortest
        blocks = [Block(shape, layer, layer >= first) for layer in range(shape.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, token_ids: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """token_ids: (N,) int64. Returns the last block's output (N, D), before the norm."""
        hidden: Tensor = self.embed_tokens(token_ids).to(self.norm.weight.dtype)
        if torch.is_grad_enabled():
            # If the table is frozen, nothing else makes the first block part of the graph.
            hidden.requires_grad_()
        for block in self.layers:
            hidden = block(hidden, tiles)
        return hidden

    def offload_inputs(self) -> None:
        """Keep the blocks' inputs in host memory from now on."""
        store = HostStore()
        for block in self.layers:
            assert isinstance(block, Block)
            block.store = store


class Llama(nn.Module):
    """The whole model. Parameters are made empty, in the default dtype and device of torch.

    keep_blocks: how many blocks, the last ones, keep their activations for backward.
    """

    def __init__(self, shape: LlamaShape, keep_blocks: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, keep_blocks)
        tied_weight = self.model.embed_tokens.weight if shape.tied else None
        self.lm_head = Head(shape, tied_weight)

    def forward(
        self, token_ids: Tensor, labels: Tensor, tiles: Sequence[Tile], scale: float
    ) -> Tensor:
        """Sum of the cross-entropy over labelled tokens, times `scale`.

        token_ids, labels: (N,) int64; labels[i] is the target of position i, -100 for none. Labels
        may be in host memory: to count the rows there, nobody waits for a GPU.
        Returns what the head returns.
        """
        hidden = self.model(token_ids, tiles)
        labelled = (labels >= 0).nonzero().squeeze(1)
        targets = labels[labelled].to(hidden.device, non_blocking=True)
        hidden = self.model.norm(hidden[labelled.to(hidden.device, non_blocking=True)])
        loss: Tensor = self.lm_head(hidden, targets, scale)
        return loss

    def logits(self, token_ids: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """token_ids: (N,) int64. Returns (N, V): for tests and for answering, not for training."""
        return self.lm_head.logits(self.model.norm(self.model(token_ids, tiles)))
