"""Self-attention over tokens: the pre-norm Transformer block of ViT and DeiT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from chiasm.layers.fused import FusedLinear, act_of
from chiasm.layers.residual import Residual


class Attention(nn.Module):
    """Multi-head self-attention, tokens (B, N, D) -> (B, N, D), through PyTorch's fused kernel."""

    def __init__(self, dim: int, *, heads: int, qkv_bias: bool = True, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(_attend(self.qkv(tokens), self.heads, self.attn_drop if self.training else 0.0))


def _attend(qkv: Tensor, heads: int, dropout: float = 0.0) -> Tensor:
    """Queries, keys and values (B, N, 3 * D) -> (B, N, D)."""
    # On a CPU the fused kernel's bf16 backward is slower than its float32 one (benchmarks/attention_cpu.py).
    slow_bf16 = qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu"
    query, key, value = (qkv.float() if slow_bf16 else qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2).to(qkv.dtype)


class TransformerBlock(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP, residuals with stochastic depth; tokens (B, N, D) -> the same."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        act: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads=heads, qkv_bias=qkv_bias, attn_drop=attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act)
        self.residual = Residual(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.residual(tokens, lambda part: self.attn(self.norm1(part)))
        return self.residual(tokens, lambda part: self.mlp(self.norm2(part)))

    def optimized(self) -> nn.Module:
        """The same for inference; itself where one of its layers was exchanged for another kind."""
        return FusedTransformerBlock(self) if self._as_built() else self

    def _as_built(self) -> bool:
        if (
            type(self.attn) is not Attention
            or type(self.mlp) is not Mlp
            or act_of(self.mlp.act) not in ("gelu", "silu")
        ):
            return False
        return all(type(layer) is nn.Linear for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2))


class FusedTransformerBlock(nn.Module):
    """A `TransformerBlock` for inference: each residual is added, and the activation applied, within a product."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        fc1, act, fc2 = block.mlp.fc1, act_of(block.mlp.act), block.mlp.fc2
        assert isinstance(fc1, nn.Linear)
        assert isinstance(fc2, nn.Linear)
        assert act is not None
        self.heads = block.attn.heads
        self.norm1, self.qkv, self.proj = block.norm1, FusedLinear(block.attn.qkv), FusedLinear(block.attn.proj)
        self.norm2, self.fc1 = block.norm2, FusedLinear(fc1, act)
        self.fc2 = FusedLinear(fc2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.proj(_attend(self.qkv(self.norm1(tokens)), self.heads), tokens)
        return self.fc2(self.fc1(self.norm2(tokens)), tokens)
