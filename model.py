"""The networks of Supervised Memory Training: Encoder, Decoder, and the RNN (updater + readout).

Glossary (paper's symbol, shape, meaning; the same names everywhere in this project)

    code    paper     shape            meaning
    B                                  sequences in a batch
    T       T                          length of a sequence: x_0 .. x_{T-1}, with x_0 = BOS
    K, d    K, d                       memory tokens, and the width of each (--mem_dim; all other
                                       streams have --d_model, which is the same unless told)
    H, hd                              attention heads, and the width of each (inner width H * hd)
    V                                  output symbols; inputs have ids of their own, the last is BOS
    Tc, Tf  T_ctx, T_fut               most context tokens an encoder pass reads; future outputs a
                                       decoder predicts
    F, P                               future targets, and last inputs, that the heads say at once
    teacher                            encoder and decoder, whose memories are the RNN's labels
    n                                  times at which one encoder pass makes memories
    N, S                               rows of any batch (often B * n), positions of any stream;
                                       in spans, updates
    x       x         (B, T) int64     inputs
    y       y         (B, T) int64     targets, -1 = no target here
    m       m_t       (B, K, d)        memory after x_0 .. x_t; tokens have root-mean-square 1 (but
                                       BPTT's m_0, which is trained)
    Encoder E_phi                      context -> m_t
    Decoder D_psi                      m_t, x_{t+1..t+Tf-1} -> y_t .. y_{t+Tf-1} (Eq. 2)
    update  f_theta                    m_{t-1}, x_t -> m_t                       (Eq. 1)
    readout g_theta                    m_t -> y_t; a Decoder that is given the memory alone

    w_*                                maps from stream to stream: muon.py knows them by that name

The indices, once, on six tokens s_0 .. s_5 predicted autoregressively (tests/test_01_index.py):

    t      0     1     2     3     4     5
    x_t    BOS   s_0   s_1   s_2   s_3   s_4      s_5 is never an input
    y_t    s_0   s_1   s_2   s_3   s_4   s_5
    m_2 has read BOS s_0 s_1.  readout(m_2) predicts y_2 = s_2.  update(m_2, x_3, 3) = m_3.
    decode(m_2, [x_3, x_4]) predicts y_2 y_3 y_4 (Tf = 3): output i sits on the last token before.
"""
import contextlib
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelConfig:
    """Everything the networks need to be built; a checkpoint stores it as a plain dict."""
    vocab: int              # input ids 0 .. vocab-1, the last one is BOS
    n_out: int              # V
    T: int                  # T: sequence length, and rows of the timestamp table
    d_model: int = 64       # width of all streams
    n_heads: int = 2        # H
    head_dim: int = 0       # hd; 0 = d_model / H
    mem_tokens: int = 4     # K
    mem_dim: int = 0        # d; 0 = d_model
    enc_layers: int = 2
    dec_layers: int = 2
    rnn_layers: int = 2
    rnn: str = "transformer"
    encoder: str = "causal"
    ctx_len: int = 0        # Tc
    fut_len: int = 16       # Tf
    heads: int = 28         # F
    past: int = 0           # P
    timestamps: str = "all"

    def __post_init__(self):
        self.mem_dim = self.mem_dim or self.d_model

    @property
    def update_layers(self) -> int:
        """Layers of one update that run one after another."""
        return 1 if self.rnn == "gru" else self.rnn_layers


def first_piece(n: int, horizon: int, gen: torch.Generator) -> int:
    """Where, of n times, the first piece of `horizon` times ends and the next one begins: anywhere,
    so that every time is now young, now old (RNN.own_memories). 0 where one piece has room for all.
    """
    return int(torch.randint(horizon, (), generator=gen)) if horizon < n else 0


ROWS = 16_384  # of one call; CUDA's attention kernels take 65,535 at most


def in_chunks(net, *rows: Tensor | None) -> Tensor:
    """net(*rows) for tensors of equally many rows, or None: at most ROWS of them a call."""
    n = len(rows[0])
    if n <= ROWS:
        return net(*rows)
    return torch.cat([net(*(v if v is None else v[i:i + ROWS] for v in rows))
                      for i in range(0, n, ROWS)])


def autocast(device: str):
    """bf16 on CUDA; fp32 elsewhere (bf16 is slower than fp32 on the CPUs tried)."""
    if device.startswith("cuda"):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def in_autocast(device: torch.device) -> bool:
    return device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)


def fp32(device: torch.device):
    """Inside, no autocast: for what bf16 would blur."""
    if in_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def on_device(v: Tensor, device: torch.device | str) -> Tensor:
    """v, made on the CPU, on the device; as it is where it is there already. From pinned memory,
    so that a CUDA GPU fetches it when it gets there and nobody waits."""
    if v.device.type == "cpu" and str(device).startswith("cuda"):
        return v.pin_memory().to(device, non_blocking=True)
    return v.to(device)


def norm(h: Tensor) -> Tensor:
    """RMS normalisation without a gain: (..., d) -> (..., d), never bf16. Memories end in it, and
    carried in bf16 they would lose every small change (before torch 2.12 autocast would)."""
    return F.rms_norm(h.to(torch.promote_types(h.dtype, torch.float32)), (h.shape[-1],))


def rope(pos: Tensor, hd: int) -> tuple[Tensor, Tensor]:
    """Rotary angles of integer positions `pos` (S,): cos and sin, each (S, hd/2)."""
    # the usual base: the slowest pair of dimensions turns once in about 60,000 positions
    freq = 10000.0 ** (-torch.arange(0, hd, 2, device=pos.device, dtype=torch.float32) / hd)
    angle = pos.float()[:, None] * freq
    return angle.cos(), angle.sin()


# Every layer of every update of a rollout asks for the same few; made anew they would be a tenth of
# all kernels.
@functools.lru_cache(1024)
def angles_of(S: int, hd: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """rope of the positions 0 .. S - 1."""
    cos, sin = rope(torch.arange(S, device=device), hd)
    return cos.to(dtype), sin.to(dtype)


def angles_for(h: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    """The angles of h (N, S, d) in the dtype in which `block` will rotate."""
    kind = torch.get_autocast_dtype(h.device.type) if in_autocast(h.device) else h.dtype
    return angles_of(h.shape[1], block.hd, h.device, kind)


def resize(width: int, new: int) -> nn.Module:
    """A linear map between the memory's width and the stream's, where they differ."""
    return nn.Identity() if width == new else nn.Linear(width, new, bias=False)


class Block(nn.Module):
    """Pre-norm Transformer block. Split in two for the Decoder, whose last layer asks for fewer
    outputs than it reads tokens."""

    def __init__(self, c: ModelConfig, layers: int):
        super().__init__()
        self.H, self.hd = c.n_heads, c.head_dim or c.d_model // c.n_heads
        inner = self.H * self.hd
        self.w_qkv = nn.Linear(c.d_model, 3 * inner, bias=False)
        self.w_out = nn.Linear(inner, c.d_model, bias=False)
        self.w_up = nn.Linear(c.d_model, 4 * c.d_model, bias=False)
        self.w_down = nn.Linear(4 * c.d_model, c.d_model, bias=False)
        # inputs are normalised, so this keeps outputs at the same size
        for w in (self.w_qkv, self.w_out, self.w_up, self.w_down):
            nn.init.normal_(w.weight, std=w.in_features ** -0.5)
        with torch.no_grad():  # `layers` blocks add up in the residual stream: start each one small
            self.w_out.weight /= (2 * layers) ** 0.5
            self.w_down.weight /= (2 * layers) ** 0.5

    def qkv(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """h (N, S, d) -> queries, keys (rotated by `angles`) and values, each (N, H, S, hd)."""
        N, S, _ = h.shape
        q, k, v = self.w_qkv(norm(h)).view(N, S, 3, self.H, self.hd).permute(2, 0, 3, 1, 4)
        cos, sin = angles
        # queries and keys turn by the same angles: in one go, half as many kernels
        a, b = torch.stack([q, k]).chunk(2, dim=-1)                     # (2, N, H, S, hd/2) each
        q, k = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return q, k, v

    def mix(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
            causal: bool = False) -> Tensor:
        """Attend and transform: h (N, S, d), keys of any length, mask (S, keys) bool (True = may
        look)."""
        N, S, _ = h.shape
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        h = h + self.w_out(a.transpose(1, 2).reshape(N, S, self.H * self.hd))
        return h + self.w_down(F.gelu(self.w_up(norm(h))))

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor], causal: bool = False) -> Tensor:
        return self.mix(h, *self.qkv(h, angles), causal=causal)


class Event(nn.Module):
    """Embeds the event (x_t, t): the symbol, and in fixed-length tasks the absolute time (the
    paper's "timestamped set"). Normalised, so that events and memory tokens enter the networks on
    one scale."""

    def __init__(self, c: ModelConfig, timed: bool):
        super().__init__()
        self.symbol = nn.Embedding(c.vocab, c.d_model)
        self.time = nn.Embedding(c.T, c.d_model) if timed else None
        for table in (self.symbol, self.time):
            if table is not None:
                nn.init.normal_(table.weight, std=c.d_model ** -0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (..., ) int64 symbols, t broadcastable int64 times -> (..., d)."""
        h = self.symbol(x)
        return norm(h if self.time is None else h + self.time(t))


class Encoder(nn.Module):
    """E_phi: the past becomes a memory. Two forms with one interface:

    bidirectional   the paper's. One time a pass: [x_{t+1-Tc} .. x_t, K learned registers], full
                    attention; the registers' outputs are the memory.
    causal          a causal Transformer over x, whose tokens also know the one before; the memory
                    at t is K linear projections of the state of token t. One pass makes the
                    memories of all times.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.event = Event(c, timed=c.timestamps != "none")
        self.blocks = nn.ModuleList(Block(c, c.enc_layers) for _ in range(c.enc_layers))
        if c.encoder == "bidirectional":
            self.registers = nn.Parameter(torch.randn(c.mem_tokens, c.d_model))
            self.w_memory = resize(c.d_model, c.mem_dim)
        else:
            self.w_before = nn.Linear(c.d_model, c.d_model, bias=False)
            self.w_memory = nn.Linear(c.d_model, c.mem_tokens * c.mem_dim, bias=False)

    def forward(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """Memories of x (B, T) int64 at `times`, None = all T -> (B, n, K, d). times (n,) int64
        ascend, and are on the CPU: nobody shall wait for a GPU to say them."""
        if self.c.encoder == "causal":
            m = self.encode_all(x if times is None else x[:, :int(times.max()) + 1])
            # all of them need no index, whose gradient would be a scatter
            return m if times is None or len(times) == m.shape[1] else \
                m[:, on_device(times, x.device)]
        times = torch.arange(x.shape[1]) if times is None else times
        return torch.stack([self.encode_window(x, t) for t in times.tolist()], dim=1)

    def encode_all(self, x: Tensor) -> Tensor:
        """x (B, L) -> the memories of all L times (B, L, K, d)."""
        assert x.shape[1] <= self.c.ctx_len, \
            f"causal labels exist for t < Tc = {self.c.ctx_len}, asked for t = {x.shape[1] - 1}; " \
            "raise --ctx_len"
        when = torch.arange(x.shape[1], device=x.device)
        h = self.event(x, when)
        # "What followed the marker?" takes attention two layers, and many steps to find; where
        # tokens know their predecessor, one (retrieval, T = 128: step 200 instead of beyond 500).
        h = h + self.w_before(torch.cat([h[:, :1], h[:, :-1]], dim=1))
        angles = angles_for(h, self.blocks[0])
        for block in self.blocks:
            h = block(h, angles, causal=True)
        return norm(self.w_memory(norm(h)).unflatten(-1, (self.c.mem_tokens, self.c.mem_dim)))

    def encode_window(self, x: Tensor, t: int) -> Tensor:
        """The last Tc tokens up to t, then the registers, full attention -> (B, K, d)."""
        start = max(0, t + 1 - self.c.ctx_len)
        when = torch.arange(start, t + 1, device=x.device)
        # The registers come last: a token's position counts from the window's start, whatever K is.
        registers = self.registers.expand(len(x), -1, -1)
        h = torch.cat([self.event(x[:, start:t + 1], when), registers], dim=1)
        angles = angles_for(h, self.blocks[0])
        for block in self.blocks:
            h = block(h, angles)
        return norm(self.w_memory(h[:, t + 1 - start:]))


class Decoder(nn.Module):
    """D_psi: causal Transformer over [m_t, x_{t+1}, x_{t+2} ..]; predicts y_t at the last memory
    token, y_{t+1} at x_{t+1}, and so on (Eq. 2). Given the memory alone it is the readout g_theta.
    Given no memory at all (K = 0) it is a plain causal language model."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.event = Event(c, timed=c.timestamps == "all")
        self.w_read = resize(c.mem_dim, c.d_model)
        self.blocks = nn.ModuleList(Block(c, c.dec_layers) for _ in range(c.dec_layers))
        self.head = nn.Linear(c.d_model, c.n_out, bias=False)
        nn.init.zeros_(self.head.weight)  # predictions start uniform, the loss at log V

    def forward(self, m: Tensor, x_fut: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """m (N, K, d); x_fut (N, Tf - 1) int64 = x_{t+1} ..; t (N,) int64 time of m.

        Returns logits (N, Tf, V) of y_t .. y_{t+Tf-1}; without memory (K = 0) logits of all but the
        first.
        """
        if len(m) > ROWS:
            return in_chunks(self, m, x_fut, t)
        h, K = self.w_read(m), m.shape[1]
        if x_fut is not None:
            when = t[:, None] + 1 + torch.arange(x_fut.shape[1], device=m.device)
            when = when.clamp(max=self.c.T - 1)  # past the end: padding
            h = torch.cat([h, self.event(x_fut, when)], dim=1)
        angles = angles_for(h, self.blocks[0])
        for block in self.blocks[:-1]:
            h = block(h, angles, causal=True)
        # the last layer has no use for the outputs of the first K - 1 memory tokens
        first, block = max(K - 1, 0), self.blocks[-1]
        q, k, v = block.qkv(h, angles)
        mask = None
        if first and h.shape[1] > K:  # the readout's one query, the last token, may look at all
            mask = torch.ones(h.shape[1] - first, h.shape[1], dtype=torch.bool, device=m.device)
            mask = mask.tril(first)
        h = block.mix(h[:, first:], q[:, :, first:], k, v, mask, causal=not first)
        return self.head(norm(h))

    def logits(self, m: Tensor) -> Tensor:
        """The readout: logits of y_t from m_t alone, (..., K, d) -> (..., V)."""
        return self(m.flatten(0, -3))[:, 0].unflatten(0, m.shape[:-2])


class TransformerUpdater(nn.Module):
    """f_theta over K memory tokens and one event token, full attention; the K outputs are the new
    memory. As all updaters: m (N, K, d) and the embedded event (N, d_model) -> (N, K, d)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.event = Event(c, timed=c.timestamps == "all")
        self.w_read, self.w_write = resize(c.mem_dim, c.d_model), resize(c.d_model, c.mem_dim)
        self.blocks = nn.ModuleList(Block(c, c.rnn_layers) for _ in range(c.rnn_layers))

    def forward(self, m: Tensor, event: Tensor) -> Tensor:
        # The tokens keep their order, so rotations tell one memory token from another.
        h = torch.cat([self.w_read(m), event[:, None]], dim=1)                 # (N, K + 1, d)
        angles = angles_for(h, self.blocks[0])
        for block in self.blocks:
            h = block(h, angles)
        return self.w_write(h[:, :-1])


class MLPUpdater(nn.Module):
    """f_theta on the memory flattened to one vector: residual blocks that also read the event."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.event = Event(c, timed=c.timestamps == "all")
        size = c.mem_tokens * c.mem_dim
        layers = lambda rows, columns: nn.ModuleList(
            nn.Linear(rows, columns, bias=False) for _ in range(c.rnn_layers))
        self.w_up = layers(size + c.d_model, 2 * size)
        self.w_down = layers(2 * size, size)
        # small at first, as in Block: an update begins as almost the identity, which keeps a memory
        for w in self.w_down:
            nn.init.normal_(w.weight, std=(2 * size * 2 * c.rnn_layers) ** -0.5)

    def forward(self, m: Tensor, event: Tensor) -> Tensor:
        h = m.flatten(1)                                                       # (N, K d)
        for up, down in zip(self.w_up, self.w_down):
            # every layer reads the event: the first alone would have to carry it along
            h = h + down(F.gelu(up(torch.cat([norm(h), event], dim=1))))
        return h.view_as(m)


class GRUUpdater(nn.Module):
    """f_theta as one GRU cell on the memory flattened to one vector; `rnn_layers` has no meaning
    here."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.event = Event(c, timed=c.timestamps == "all")
        self.cell = nn.GRUCell(c.d_model, c.mem_tokens * c.mem_dim)

    def forward(self, m: Tensor, event: Tensor) -> Tensor:
        # The memory is carried from step to step: bf16 would round off every small change of it
        with fp32(m.device):
            return self.cell(event.float(), m.float().flatten(1)).view_as(m)


UPDATERS = {"transformer": TransformerUpdater, "mlp": MLPUpdater, "gru": GRUUpdater}


class RNN(nn.Module):
    """The recurrent network: memory m_0 of "BOS was read", updater (Eq. 1) and readout. Needs no
    encoder."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.m0 = nn.Parameter(norm(torch.randn(c.mem_tokens, c.mem_dim)))
        self.updater = UPDATERS[c.rnn](c)
        self.readout = Decoder(c)

    def start(self, n: int) -> Tensor:
        """m_0 for n sequences: (n, K, d)."""
        return self.m0.expand(n, -1, -1)

    def update(self, m: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """m_t from m_{t-1} (..., K, d), x_t (...) int64 and t int64, which may lack leading
        dimensions (Eq. 1); RMS-normalised per token. All rows at once, whatever their times."""
        return self.next_memory(m, self.updater.event(x, t))

    def next_memory(self, m: Tensor, event: Tensor) -> Tensor:
        """The same for events (..., d) that are embedded already."""
        rows = in_chunks(self.updater, m.flatten(0, -3), event.flatten(0, -2))
        # The encoder's memories are normalised too. Else a rollout could grow or shrink for ever.
        return norm(rows).unflatten(0, m.shape[:-2])

    def logits(self, m: Tensor) -> Tensor:
        """Logits of y_t from m_t: (..., K, d) -> (..., V)."""
        return self.readout.logits(m)

    def rollout(self, m: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """Own memories on data inputs: from m = m_{t-1} (B, K, d) read x (B, S) =
        x_t .. x_{t+S-1} -> (B, S, K, d). t is one time, or one for each row (B,)."""
        first = t if isinstance(t, int) else t[:, None]         # of all rows, or of each
        when, out = first + torch.arange(x.shape[1], device=x.device), []
        # Only the updates must wait for each other: all inputs are there, and embedded in one go.
        for event in self.updater.event(x, when).unbind(1):
            m = self.next_memory(m, event)
            out.append(m)
        return torch.stack(out, dim=1) if out else m.new_empty(len(m), 0, *m.shape[1:])

    def memories(self, x: Tensor) -> Tensor:
        """Rollout of whole sequences x (B, T), alone from m_0: m_0 .. m_{T-1} as (B, T, K, d)."""
        m0 = self.start(len(x))
        return torch.cat([m0[:, None], self.rollout(m0, x[:, 1:], 1)], dim=1)

    @torch.no_grad()
    def own_memories(self, labels: Tensor, x: Tensor, times: Tensor, horizon: int,
                     start: int) -> Tensor:
        """Where the RNN really is: its own memories, at most horizon - 1 updates away from an
        encoder's, without a graph: (B, n, K, d).

        labels (B, n, K, d) are the encoder's memories at n consecutive times, x (B, n) the inputs
        there. All sequences are cut into pieces at `start` (first_piece) and every `horizon` times
        from there; where a piece begins, and at the first time, the memory is the encoder's, from
        there the RNN runs alone, all pieces at once.
        """
        n, times = x.shape[1], on_device(times, x.device)
        horizon, own = min(horizon, n), labels.detach().clone()
        events = self.updater.event(x, times)
        for age in range(1, horizon):
            # all places i with (i - start) mod horizon = age, but 0, always a label: n = 8,
            # horizon = 4, start = 2 makes 3 and 7, then 4, then 1 and 5; 0, 2 and 6 are labels
            first = (start + age) % horizon or horizon
            if first < n:
                before, now = slice(first - 1, n - 1, horizon), slice(first, n, horizon)
                own[:, now] = self.next_memory(own[:, before], events[:, now]).to(own.dtype)
        return own


class Heads(nn.Module):
    """Linear maps from a memory to its next F targets, and to the P inputs it has read last. They
    make every memory say what comes and what came, for almost nothing. They help to train; no
    reported number reads them."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.F, self.P, self.bos, size = c.heads, c.past, c.vocab - 1, c.mem_tokens * c.mem_dim
        self.linear = nn.Linear(size, c.heads * c.n_out, bias=False) if c.heads else None
        self.past = nn.Linear(size, c.past * (c.vocab - 1), bias=False) if c.past else None
        for w in (self.linear, self.past):
            if w is not None:
                nn.init.zeros_(w.weight)  # as the decoder's: predictions start uniform

    def forward(self, m: Tensor, n: int = 0) -> Tensor:
        """m (N, K, d) -> logits (N, F, V) of the next F valid targets, y_t and later, or of the
        first n of them, (N, n, V)."""
        return self.logits(self.linear.weight.unflatten(0, (self.F, -1))[:n or self.F], m)

    def recall(self, m: Tensor) -> Tensor:
        """m (N, K, d) -> logits (N, P, inputs without BOS) of x_t, x_{t-1} .."""
        return self.logits(self.past.weight.unflatten(0, (self.P, -1)), m)

    @staticmethod
    def logits(w: Tensor, m: Tensor) -> Tensor:
        """w (n, V, K d) -> (N, n, V); of two symbols (N, n, 1), the logit of 1 over that of 0: half
        the work."""
        w = w[:, 1:] - w[:, :1] if w.shape[1] == 2 else w
        return F.linear(m.flatten(1), w.flatten(0, 1)).unflatten(1, (len(w), -1))
