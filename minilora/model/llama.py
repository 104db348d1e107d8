"""Llama 3, Qwen2, Qwen3 or Mistral over a flat run of documents, parameters named as in the files.

From below: linear layer and norm, attention and MLP, the block made of both, embedding and head,
and the model. There is no batch axis and no padding: the documents of a span lie one after
another, and hidden states are (N, D), N being the tokens of all of them.
"""

# Shape letters: N tokens, D model, F MLP, H heads, K kv heads, E head dim, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.model.dropout import MaskPlace, SeededDropout, dropout_seed
from minilora.model.linear import linear
from minilora.model.llama_shape import LlamaShape
from minilora.model.loss import CHUNK_ROWS, head_loss, head_scores
from minilora.model.matrix import Matrix, unpacked_once
from minilora.model.nf4_shape import packed_columns
from minilora.model.offload import HostStore
from minilora.model.recompute import recompute, save_activations
from minilora.model.rope import rotate
from minilora.model.swiglu import swiglu
from minilora.model.tiles import MlpPiece, Tile
from minilora.model.working_copies import working


class Linear(nn.Module):
    """y = x W^T + b, frozen and without random initialisation: the numbers come from files.

    packed: whether the weight is held in 4 bits, see nf4.py.
    """

    def __init__(
        self, out_features: int, in_features: int, bias: bool, packed: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        if packed:
            empty = torch.empty(out_features, packed_columns(in_features), dtype=torch.uint8)
        else:
            empty = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.matrix = Matrix(self.weight)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor, graph_only: bool = False) -> Tensor:
        """x: (N, in). Returns (N, out); graph_only: see `linear`."""
        return linear(x, self.matrix, self.bias, None, graph_only)


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
        self.layer = layer
        self.head_dim = shape.head_dim
        sizes = shape.linear_shapes()
        self.q_proj = Linear(*sizes["q_proj"], "q_proj" in shape.biased, shape.packed)
        self.k_proj = Linear(*sizes["k_proj"], "k_proj" in shape.biased, shape.packed)
        self.v_proj = Linear(*sizes["v_proj"], "v_proj" in shape.biased, shape.packed)
        self.o_proj = Linear(*sizes["o_proj"], "o_proj" in shape.biased, shape.packed)
        # Qwen3 norms each head by itself; the weight (E,) is the same for all heads.
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, tile: Tile) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_proj(x).unflatten(-1, heads)  # (N, H, E)
        key = self.k_proj(x).unflatten(-1, heads)  # (N, K, E)
        value = self.v_proj(x).unflatten(-1, heads)  # (N, K, E)

        query = rotate(self.q_norm(query), tile.rotation)
        key = rotate(self.k_norm(key), tile.rotation)
        attended = tile.attend(self.layer, query, key, value)  # (N, H, E)

        output: Tensor = self.o_proj(attended.flatten(1))  # (N, D)
        return output


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): (N, D) to (N, D)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        sizes = shape.linear_shapes()
        self.gate_proj = Linear(*sizes["gate_proj"], "gate_proj" in shape.biased, shape.packed)
        self.up_proj = Linear(*sizes["up_proj"], "up_proj" in shape.biased, shape.packed)
        self.down_proj = Linear(*sizes["down_proj"], "down_proj" in shape.biased, shape.packed)

    def forward(self, x: Tensor, piece: MlpPiece) -> Tensor:
        # Gate and up have no names here, so that their memory is free before the last product.
        activated = swiglu(self.gate_proj(x), self.up_proj(x))  # (N, F)
        # The last product of a block: nothing but the block's output depends on it, so a block
        # that is recomputed for its graph alone leaves it out.
        output: Tensor = self.down_proj(activated, piece.graph_only)  # (N, D)
        return output


class Block(nn.Module):
    """A decoder block: norm and attention, norm and MLP, each added to the hidden states.

    It is the unit of everything: ZeRO-3 gathers its parameters together, backward recomputes it,
    and the loop over tiles runs inside it, so that all tiles share one gather.
    saves_activations: whether it saves them for backward instead of recomputing them.
    """

    def __init__(self, shape: LlamaShape, layer: int, saves_activations: bool) -> None:
        super().__init__()
        self.layer = layer
        self.saves_activations = saves_activations
        self.dropout: SeededDropout | None = None  # of all its LoRA layers, see lora.py
        self.store: HostStore | None = None  # of the inputs, shared by all blocks
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)
        matrices = [layer.matrix for layer in self.modules() if isinstance(layer, Linear)]
        self.unpacked_once = partial(unpacked_once, matrices)

    def forward(self, hidden: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """hidden: (N, D), covered by the rows of the tiles in order. Returns (N, D)."""
        if not torch.is_grad_enabled():
            with self.unpacked_once():
                return torch.cat([self._forward_tile(hidden[tile.rows], tile) for tile in tiles])

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.saves_activations:
            return save_activations(self._forward_tile, hidden, tiles, trained, self.unpacked_once)
        return recompute(self._forward_tile, hidden, tiles, trained, self.store, self.unpacked_once)

    def _forward_tile(self, hidden: Tensor, tile: Tile) -> Tensor:
        """The block's equations for the rows of one tile, (N, D) to (N, D)."""
        self._reseed(tile.masks, hidden)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), tile)

        pieces = [
            MlpPiece(rows, replace(tile.masks, piece=number), tile.graph_only)
            for number, rows in enumerate(tile.pieces, 1)
        ]
        if len(pieces) == 1:
            return self._forward_mlp(hidden, pieces[0])

        # A long tile. Its MLP is recomputed piece by piece within the backward of the tile, so
        # that the wide activations of only one piece exist at a time. The graph of the tile leads
        # to what is computed with in place of the parameters.
        trained = [working(p) for p in self.mlp.parameters() if p.requires_grad]
        return recompute(self._forward_mlp, hidden, pieces, trained)

    def _forward_mlp(self, hidden: Tensor, piece: MlpPiece) -> Tensor:
        self._reseed(piece.masks, hidden)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), piece)
        return output

    def _reseed(self, place: MaskPlace, hidden: Tensor) -> None:
        """From here on draw the dropout masks of this place; the same ones when recomputed."""
        if self.dropout is not None:
            self.dropout.reseed(dropout_seed(place, self.layer), hidden.device)


class Embedding(nn.Module):
    """Token ids (N,) to rows (N, D) of a table (V, D)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        empty = torch.empty(shape.vocab_size, shape.hidden_size)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class Head(nn.Module):
    """The language-model head: normed hidden states to the loss, or to logits."""

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
        weight = self.weight.to(hidden.dtype)  # fp32 where the head is trained at ZeRO stage 0
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
        # Backward reaches the last blocks first, so their activations are saved for the shortest.
        first_saving = shape.num_layers - keep_blocks
        blocks = [Block(shape, layer, layer >= first_saving) for layer in range(shape.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, token_ids: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """token_ids: (N,) int64. Returns the last block's output (N, D), before the norm."""
        # The table is fp32 where it is trained at ZeRO stage 0.
        hidden: Tensor = self.embed_tokens(token_ids).to(self.norm.weight.dtype)
        if torch.is_grad_enabled():
            # Where the table is frozen, nothing else makes the first block part of the graph, and
            # DeepSpeed's hook on its backward would fire before its gradients exist.
            hidden.requires_grad_()
        for block in self.layers:
            hidden = block(hidden, tiles)
        return hidden

    def offload_inputs(self) -> None:
        """From now on, save the blocks' inputs in host memory."""
        store = HostStore()
        for block in self.layers:
            assert isinstance(block, Block)
            block.store = store


class Llama(nn.Module):
    """The whole model. Parameters are made empty, in the default dtype and device of torch.

    keep_blocks: how many blocks, the last ones, save their activations for backward.
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

        token_ids, labels: (N,) int64; labels[i] is the target of position i, -100 for none.
        Labels may stay in host memory, and for training they should: how many there are is the
        size of the next tensor, and a count on the GPU would make the host wait for its result.
        Returns what the head returns.
        """
        hidden = self.model(token_ids, tiles)  # (N, D)

        # From here on only the rows that have a label.
        labelled = (labels >= 0).nonzero().squeeze(1)
        targets = labels[labelled].to(hidden.device, non_blocking=True)
        hidden = self.model.norm(hidden[labelled.to(hidden.device, non_blocking=True)])

        loss: Tensor = self.lm_head(hidden, targets, scale)
        return loss

    def logits(self, token_ids: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """token_ids: (N,) int64. Returns (N, V): for tests and for answering, not for training."""
        return self.lm_head.logits(self.model.norm(self.model(token_ids, tiles)))
