"""The peer of bench_generate.py in torch: a decoder of the same shape, compiled with CUDA graphs and a static cache."""

import time

import torch
import torch.nn.functional as F

STEPS = 100


class Linear(torch.nn.Module):
    """A product without bias, with an unmerged LoRA of a rank (0: none)."""

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        make = lambda *size: torch.nn.Parameter(torch.randn(*size, device="cuda", dtype=torch.bfloat16) * 0.02, False)  # noqa: E731, E501
        self.w = make(outputs, inputs)
        self.a, self.b = (make(rank, inputs), make(outputs, rank)) if rank else (None, None)

    def forward(self, x):
        y = F.linear(x, self.w)
        return y if self.a is None else y + 2 * F.linear(F.linear(x, self.a), self.b)


def norm(x):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Layer(torch.nn.Module):
    """A Qwen3 decoder layer that writes its keys and values into a cache of a fixed length."""

    def __init__(self, text: dict, rank: int, columns: int):
        super().__init__()
        size, self.heads, self.kv, self.dim = (
            text[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        inner = text["intermediate_size"]
        self.q = Linear(self.heads * self.dim, size, rank)
        self.k, self.v = (Linear(self.kv * self.dim, size, rank) for _ in range(2))
        self.o = Linear(size, self.heads * self.dim, rank)
        self.gate, self.up, self.down = Linear(inner, size, rank), Linear(inner, size, rank), Linear(size, inner, rank)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, self.kv, columns, self.dim, device="cuda", dtype=torch.bfloat16))

    def forward(self, x, cos, sin, position, mask):
        n = norm(x)
        q = norm(self.q(n).view(1, 1, self.heads, self.dim)).transpose(1, 2)
        k = norm(self.k(n).view(1, 1, self.kv, self.dim)).transpose(1, 2)
        half = self.dim // 2
        q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, self.v(n).view(1, 1, self.kv, self.dim).transpose(1, 2))
        o = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).reshape(1, 1, -1))
        n = norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Decoder(torch.nn.Module):
    def __init__(self, text: dict, rank: int, columns: int):
        super().__init__()
        self.embed = Linear(text["vocab_size"], text["hidden_size"], 0)
        self.layers = torch.nn.ModuleList([Layer(text, rank, columns) for _ in range(text["num_hidden_layers"])])

    def forward(self, token, cos, sin, position, mask):
        x = F.embedding(token, self.embed.w)[:, None]
        for layer in self.layers:
            x = layer(x, cos, sin, position, mask)
        return self.embed(norm(x[:, -1])).argmax(-1)


@torch.no_grad()
def steps_per_second(text: dict, rank: int, prompt: int, columns: int) -> float:
    """Return the rate of single steps after a prompt, the model compiled with mode="reduce-overhead"."""
    compiled = torch.compile(Decoder(text, rank, columns), mode="reduce-overhead", fullgraph=True)
    token, position = torch.zeros(1, dtype=torch.long, device="cuda"), torch.tensor([prompt], device="cuda")
    cos = torch.randn(1, 1, 1, text["head_dim"], device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, columns, device="cuda", dtype=torch.bfloat16)
    mask[..., prompt + 1 :] = float("-inf")
    for _ in range(4):
        compiled(token, cos, cos, position, mask)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        compiled(token, cos, cos, position, mask).clone()
    torch.cuda.synchronize()
    rate = STEPS / (time.perf_counter() - start)
    torch.cuda.empty_cache()
    return rate
