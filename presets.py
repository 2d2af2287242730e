"""Every recipe in one table: what the flags are when nobody gives them.

    (SMT, DMT, BPTT)      one value each
    value                 the same for all three
    _                     the method has no such flag; in a later block: stays as it was

`laptop` names every flag that has no default in flags.py. `gpu` and `paper` say what differs from
it, and so do the blocks of KINDS, for some datasets. --help shows the result for the preset and
dataset it is asked about.
"""
_ = None
METHODS = ("smt", "dmt", "bptt")

PRESETS = {}
PRESETS["laptop"] = {
    # networks; DMT, and BPTT that starts from a checkpoint, have theirs from there
    "rnn": "gru",  # a third of the Transformer's time, and better in it
    "encoder": "causal",
    "d_model": 64,
    "n_heads": 2,
    "head_dim": 0,
    "mem_tokens": 4,
    "mem_dim": 0,
    "enc_layers": 2,
    "dec_layers": 2,
    "rnn_layers": 2,
    "ctx_len": 0,
    "fut_len": 28,
    "heads": 28,
    "past": 112,
    "timestamps": "all",

    # the optimiser       SMT           DMT           BPTT
    "optimizer": "muon",
    "lr":                (1.2e-2,       3e-3,         5e-3),  # SMT is short here
    "warmup":            (50,           30,           50),
    "decay": 0.05,
    "ema": 0.99,
    "batch_size":        (12,           128,          24),

    # the objective       SMT           DMT           BPTT
    "lambda_dec":        (1.0,          1.0,          _),
    "lambda_dyn":        (0.3,          _,            _),
    "lambda_unif":       (0.001,        _,            _),
    "lambda_mse":        (_,            0.01,         _),
    "detach_rnn":        (False,        _,            _),
    "detach_dec":        (_,            False,        _),
    "times":             (0,            _,            _),
    "rnn_batch":         (3,            _,            _),
    "rnn_from":          (0.5,          _,            _),
    "decode_own":        (True,         _,            _),
    "first":             (0.25,         0.15,         1.0),
    "lambda_heads":      (_,            _,            0.0),  # BPTT as everyone has it
    "futures":           (48,           _,            _),
    "heads_part": 1.0,
    "octaves":           (False,        _,            _),
    "lambda_fut":        (0.25,         _,            _),
    "lambda_past":       (2.0,          2.0,          _),
    "horizon":           (0,            1_000_000,    _),  # DMT: whole rollouts from the start
    "micro":             (1,            _,            _),
    "span":              (_,            16,           _),
    "spans":             (_,            0,            _),
    "truncate":          (_,            _,            0),
    "recompute":         (_,            _,            0),

    # the run; a step of BPTT is long, so it is logged and saved more often
    "steps": 0,
    "minutes":           (3.0,          1.5,          4.5),
    "log_every":         (50,           50,           10),
    "eval_every":        (250,          250,          100),
    "ckpt_every":        (250,          250,          100),
    "n_val": 200,
}

PRESETS["gpu"] = {  # the paper's widths and depths, with the laptop's cheap labels and objective
    "rnn": "transformer",
    "d_model": 256,
    "n_heads": 4,
    "mem_tokens": 16,
    "enc_layers": 8,
    "dec_layers": 4,
    "rnn_layers": 8,
    #                     SMT           DMT           BPTT
    "lr":                (1e-3,         3e-4,         3e-4),
    "warmup":            (200,          200,          0.05),  # BPTT has a few hundred steps
    # An update is hundreds of small kernels, one after another, and takes as long for many rows as
    # for few: short rollouts in SMT, many sequences in DMT
    "batch_size":        (64,           512,          128),
    "rnn_batch":         (4,            _,            _),
    "horizon":           (32,           _,            _),
    "first":             (0.1,          0.25,         _),
    "futures":           (128,          _,            _),
    "recompute":         (_,            _,            28),
    "minutes":           (12.0,         5.0,          17.0),
    "log_every":         (50,           20,           5),
    # a validation is a rollout too: some seconds, as long as a few steps of BPTT
    "eval_every":        (2000,         500,          50),
    "ckpt_every":        (1000,         250,          25),
}

PRESETS["paper"] = {
    "rnn": "transformer",
    "encoder": "bidirectional",
    "d_model": 256,
    "n_heads": 8,
    "head_dim": 64,
    "mem_tokens": 16,
    "enc_layers": 8,
    "dec_layers": 4,
    "rnn_layers": 8,
    "ctx_len": 256,
    "fut_len": 64,
    "heads": 0,
    "past": 0,
    "timestamps": "none",
    "optimizer": "adamw",
    "ema": 0.0,
    #                     SMT           DMT           BPTT
    "lr":                (3e-4,         3e-5,         3e-4),
    "warmup": 0.01,
    "decay":             (1.0,          0.0,          1.0),
    "batch_size":        (128,          32,           128),
    "lambda_dyn":        (0.1,          _,            _),
    "lambda_mse":        (_,            10.0,         _),
    "detach_dec":        (_,            True,         _),
    "times":             (2,            _,            _),
    "rnn_batch":         (0,            _,            _),
    "rnn_from":          (0.0,          _,            _),
    "decode_own":        (False,        _,            _),
    "first":             (0.0,          1.0,          _),
    "futures":           (32,           _,            _),  # of a micro-batch's 64, at random
    "lambda_fut":        (1.0,          _,            _),
    "horizon":           (1,            256,          _),
    "micro":             (4,            _,            _),
    "span":              (_,            1,            _),
    # a fresh batch every step; where T = 256 one in 16 of its updates has a label
    "spans":             (_,            512,          _),
    "recompute":         (_,            _,            28),  # else 265 GB for MNIST
    "steps":             (150_000,      1500,         150_000),
    "minutes": 0.0,
    "log_every": 50,
    "eval_every": 1000,
    "ckpt_every": 1000,
}

# What differs for a dataset, or for "text" or "synthetic" ones, or where symbols are "bytes", which
# those of texts are and of pictures with 256 levels; or for an updater.
# From top to bottom; "any" stands for every preset.
KINDS = {}
KINDS["laptop", "bytes"] = KINDS["gpu", "bytes"] = {
    "heads": 1,  # 28 of them, 7,168 logits a memory, would take more time than all the rest
    "past": 0,
}
KINDS["laptop", "text"] = {
    "length": 128,
    "minutes":           (12.0,         6.0,          18.0),
    "lr":                (5e-3,         5e-3,         _),
    "first":             (_,            0.5,          _),  # no time is as dull as a margin's pixel
}
KINDS["laptop", "mlp"] = {  # wants smaller steps than the other two, of more sequences
    "rnn_layers": 1,
    "lr":                (_,            1.5e-3,       2.5e-3),
    "batch_size":        (_,            192,          _),
}
KINDS["laptop", "transformer"] = {
    "lr":                (_,            3e-3,         2.5e-3),
}
KINDS["laptop", "mnist"] = {
    "image_size": 14,
    "minutes":           (2.5,          17.5,         20.0),
}
KINDS["gpu", "glyphs"] = {  # a first look, wherever it is run
    "minutes":           (3.0,          1.5,          4.5),
}
KINDS["laptop", "sketchy"] = {
    "minutes":           (10.0,         5.0,          15.0),
    "lr":                (5e-3,         _,            _),
    "batch_size":        (4,            64,           12),
    "n_val": 40,
    "fut_len":           (40,           _,            _),  # more than a row of pixels
    "heads":             (64,           _,            _),
    "past": 128,
}
KINDS["any", "synthetic"] = {  # the paper: Tc = Tf = T for these
    "ctx_len": 0,
    "fut_len": 0,
    "past": 0,  # most of what they tell may be forgotten
}
KINDS["laptop", "synthetic"] = {
    "minutes":           (2.5,          7.5,          10.0),
    "batch_size":        (64,           64,           64),
    "lr":                (_,            5e-3,         5e-3),
    "lambda_mse":        (_,            0.03,         _),
    "first":             (1.0,          1.0,          _),  # few times ask for anything
    "futures":           (32,           _,            _),
    "span":              (_,            32,           _),
    # a symbol that the RNN has lost cannot be asked for: short rollouts first
    "horizon":           (_,            0,            _),
}
KINDS["laptop", "recall"] = {  # but not here: any key may be asked for
    "past": 64,
    "lambda_past":       (0.5,          0.5,          _),
    # which value will be due is decided by a key to come, so no head can say it: futures can
    "heads":             (0,            _,            _),
    "batch_size":        (128,          _,            _),
    "futures":           (256,          _,            _),
    "octaves":           (True,         _,            _),
    "lambda_fut":        (1.0,          _,            _),
    "rnn_batch":         (32,           _,            _),
    "rnn_from":          (0.6,          _,            _),
    "lambda_mse":        (_,            0.3,          _),
    "lr":                (_,            1e-3,         _),  # not to lose what SMT has found
}
# What y will be hangs on an x to come: no head can say it.
KINDS["laptop", "modular"] = KINDS["gpu", "modular"] = {
    "heads":             (0,            _,            _),
}
# A span crosses the whole string: who need not ask early learns it better.
KINDS["laptop", "copy"] = KINDS["gpu", "copy"] = {
    "heads":             (0,            _,            _),
}
KINDS["gpu", "synthetic"] = {  # as the laptop's
    "lambda_mse":        (_,            0.03,         _),
    "first":             (1.0,          1.0,          _),
    "span":              (_,            32,           _),
    "horizon":           (_,            0,            _),
    "recompute":         (_,            _,            0),  # T = 64 fits
}
KINDS["laptop", "permutation"] = KINDS["gpu", "permutation"] = {
    # every time asks for one of 120 symbols: all 28 heads of all memories would take two thirds of
    # a step, the readout a fifth
    "heads_part": 0.125,
    "first":             (0.3,          0.3,          _),
}
KINDS["paper", "mnist"] = {
    "levels": 256,
}
KINDS["paper", "text"] = {  # Tc + Tf: a full context and a full future
    "length": 320,
}
KINDS["paper", "synthetic"] = {  # here the paper trains all memories of a sequence
    "times":             (0,            _,            _),
    "futures":           (1_000_000,    _,            _),  # of all memories there are
}

# MLP and GRU read the memory as one vector; one matrix from it to itself would have 17 million
# entries. With these widths all updaters have about the same number of parameters.
KINDS["gpu", "mlp"] = {
    "mem_dim": 52,
    "rnn_layers": 2,
}
KINDS["gpu", "gru"] = {
    "mem_dim": 84,
}
KINDS["paper", "mlp"] = {
    "mem_dim": 60,
    "rnn_layers": 2,
}
KINDS["paper", "gru"] = {
    "mem_dim": 96,
}


def recipe(method: str, preset: str, kinds: tuple = ()) -> dict:
    """The flags of a method, by name, for a dataset and an updater of these kinds."""
    blocks = [PRESETS["laptop"], PRESETS[preset]]
    blocks += [block for (where, kind), block in KINDS.items()
               if where in ("any", preset) and kind in kinds]
    out, column = {}, METHODS.index(method)
    for block in blocks:
        for flag, value in block.items():
            value = value[column] if isinstance(value, tuple) else value
            if value is not None:
                out[flag] = value
    return out
