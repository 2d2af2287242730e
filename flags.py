"""The command line of the training scripts: a dataclass of flags, presets, and one line for every mistake.

    cfg, ckpt = flags.parse(Config, argv, PRESETS, script, doc)   # flags -> dataclass, checkpoint to start from
    flags.cli(main)                                               # mistakes of the user: one line, exit code 2

Nothing here is about the method. A script's own Config adds its flags to those below.
"""
import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass

import torch

import data as datasets
from model import UPDATERS, CheckpointError, load_checkpoint


class UsageError(Exception):
    """Bad input of the user; the message is one line that names the flag or file and what to do."""


def flag(default, help: str, group: str = "method", choices=None):
    """A command-line flag as a dataclass field. `group` says who owns it: "task" and "model" flags come from
    the checkpoint where one is given; "length" flags, how long and where, may change on resume; all others may not."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, choices=choices))


@dataclass
class Config:
    """Flags of every training script. Defaults are those of the laptop preset."""
    dataset: str = flag("glyphs", "what to learn", "task", sorted(datasets.OPTIONS))
    image_size: int = flag(None, "pixels a side, for images", "task")
    levels: int = flag(None, "grey levels: 2 or 256", "task")
    binarize: str = flag(None, "how mnist gets its 2 levels: at half intensity, or one fixed Bernoulli draw", "task",
                         ("threshold", "static"))
    glyphs: str = flag(None, "the characters", "task")
    jitter: float = flag(None, "strength of the random affine maps", "task")
    length: int = flag(None, "sequence length T, BOS included", "task")
    data_file: str = flag(None, "the text to learn, any UTF-8 file, plain or gzipped", "length")
    variant: str = flag(None, "the task as the paper's authors define it, or another of that name",
                        "task", datasets.VARIANTS)
    symbols: int = flag(None, "number of symbols", "task")
    noise: float = flag(None, "probability that a target is redrawn", "task")
    needle_range: int = flag(None, "last position of the needle; 0 = the end of the first half, with "
                             "--variant ours of the first quarter", "task")
    reverse: bool = flag(None, "ask for the string backwards", "task")
    depth: int = flag(None, "height of a full stack", "task")
    keys: int = flag(None, "number of key-value pairs", "task")
    key_len: int = flag(None, "symbols in a key", "task")
    examples: int = flag(None, "examples in context", "task")
    modulus: int = flag(None, "p of y = w x + b (mod p); 0 = 32, with --variant ours 7", "task")
    items: int = flag(None, "things that are permuted", "task")
    gamma: float = flag(None, "factor on a symbol's weight for each step of its age, or position",
                        "task")

    rnn: str = flag("transformer", "updater of the RNN", "model", sorted(UPDATERS))
    encoder: str = flag("causal", "attention pattern of the encoder", "model", ("bidirectional", "causal"))
    d_model: int = flag(64, "d: width of memory tokens and residual streams", "model")
    n_heads: int = flag(2, "H: attention heads", "model")
    head_dim: int = flag(0, "width of a head; 0 = d / H", "model")
    mem_tokens: int = flag(4, "K: memory tokens", "model")
    enc_layers: int = flag(2, "layers of the encoder", "model")
    dec_layers: int = flag(2, "layers of the decoder and the readout", "model")
    rnn_layers: int = flag(2, "layers of the updater", "model")
    ctx_len: int = flag(0, "Tc: most tokens the encoder reads; 0 = the whole sequence", "model")
    fut_len: int = flag(16, "Tf: future outputs the decoder predicts; 0 = the whole sequence", "model")
    timestamps: bool = flag(True, "give encoder, decoder and updater the absolute time of every token", "model")

    data_dir: str = flag(os.environ.get("SMT_DATA_DIR", "data"), "where data files are, or are downloaded to; the "
                         "environment variable SMT_DATA_DIR changes the default", "length")
    out_dir: str = flag("", "where the run writes; empty = runs/<script>-<dataset>", "length")
    preset: str = flag("", "sizes and recipe; empty = gpu on CUDA, else laptop", choices=("laptop", "gpu", "paper"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...", "length")
    threads: int = flag(0, "CPU threads; 0 = torch's choice", "length")
    seed: int = flag(0, "seed of weights and batches")
    steps: int = flag(0, "length of the run in optimiser steps; 0 = no limit", "length")
    minutes: float = flag(4.75, "length of the run in minutes, all resumes together; 0 = no limit", "length")
    stop_after: float = flag(0.0, "end this call after so many minutes, saved and resumable; 0 = never", "length")
    batch_size: int = flag(24, "sequences a step")
    optimizer: str = flag("muon", "muon for the matrices and AdamW for the rest, or adamw for all",
                          choices=("muon", "adamw"))
    lr: float = flag(5e-3, "peak learning rate; adamw wants about a quarter of what muon takes")
    warmup: int = flag(50, "steps of linear warm-up")
    decay: bool = flag(True, "cosine decay of the learning rate to 5 %% of its peak at the end of the run")
    ema: float = flag(0.99, "decay of the average of the weights that is evaluated, saved and sampled; 0 = none")
    log_every: int = flag(50, "steps between log lines", "length")
    eval_every: int = flag(250, "steps between evaluations on the validation split; 0 = only at the end", "length")
    n_val: int = flag(200, "validation sequences of an evaluation, and at most 40 samples", "length")
    ckpt_every: int = flag(250, "steps between checkpoints; 0 = only at the end", "length")
    compile: bool = flag(False, "torch.compile the Transformer blocks")
    resume: bool = flag(False, "continue the run in out_dir", "length")
    overwrite: bool = flag(False, "replace the run in out_dir", "length")


# The paper's sizes for "paper"; "gpu" keeps the sizes and takes the cheaper labels and schedule.
_big = dict(d_model=256, n_heads=4, mem_tokens=16, enc_layers=8, dec_layers=4, rnn_layers=8, batch_size=128)
SIZES = {
    "laptop": dict(),
    "gpu": _big | dict(lr=1e-3, warmup=200, eval_every=500, ckpt_every=500),
    "paper": _big | dict(n_heads=8, head_dim=64, encoder="bidirectional", ctx_len=256, fut_len=64, timestamps=False,
                         optimizer="adamw", lr=3e-4, ema=0.0, minutes=0.0, eval_every=1000, ckpt_every=1000),
}


def preset_values(preset: str, dataset: str, own: dict) -> dict:
    """Values of a preset; `own` are the script's: {preset: values, (preset, kind): values}, where a kind is "synthetic",
    "tracking" (some of the synthetic tasks), "text" or a dataset."""
    kind = "synthetic" if dataset in datasets.SYNTHETIC else "text" if dataset in datasets.TEXTS else dataset
    out = SIZES[preset] | own.get(preset, {})
    if kind == "synthetic":  # the paper: Tc = Tf = T for these
        out |= dict(ctx_len=0, fut_len=0)
    elif preset == "laptop":
        out |= dict(image_size=14) if kind == "mnist" else dict(length=128) if kind == "text" else {}
    return out | own.get((preset, kind), {}) | (own.get((preset, "tracking"), {}) if dataset in datasets.TRACKING else {})


def fail(message: str):
    raise UsageError(message)


def parse(Config, argv, own_presets: dict, script: str, doc: str, unused: tuple = ()):
    """Flags -> (config, checkpoint to build the networks from, or None). Flags in `unused` mean nothing to the script.

    Values come, from weakest to strongest: defaults, preset, the checkpoint of --ckpt or --init (task and model), the
    command line. With --resume everything comes from the stored run, and the command line may only change "length"
    flags; the checkpoint is then the run's own. Raises UsageError, CheckpointError.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    group = {name: f.metadata["group"] for name, f in fields.items()}
    p = argparse.ArgumentParser(prog=f"{script}.py", description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail  # one line instead of a usage block
    add_flags(p, [f for f in fields.values() if f.name not in unused])
    given = vars(p.parse_args(argv))
    if given.get("resume") and given.get("overwrite"):
        fail("--resume continues a run and --overwrite replaces it; give one of them")

    source = given.get("ckpt") or given.get("init")
    ckpt = open_checkpoint(source) if source else None
    values = {k: v for k, v in ckpt["config"].items() if group.get(k) in ("task", "model")} if ckpt else {}
    for name in given:
        if ckpt and group[name] in ("task", "model"):
            fail(f"--{name} comes from the checkpoint {source}; leave it out, or train a new one")
    if ckpt:
        values |= where(given, ckpt["config"])
    dataset = values.get("dataset") or given.get("dataset") or fields["dataset"].default
    out_dir = given.get("out_dir") or f"runs/{script}-{dataset}"
    newest = os.path.join(out_dir, "ckpt.pt")
    if given.get("resume"):
        ckpt = open_checkpoint(newest)
        values = ckpt["config"] | dict(overwrite=False, stop_after=0.0)
        if ckpt["script"] != script:
            fail(f"--out_dir {out_dir} holds a run of {ckpt['script']}.py; resume it with that script")
        for name, f in fields.items():
            if f.metadata["group"] != "length" and name not in values:
                raise CheckpointError(f"{newest}: does not say what --{name} was; it comes from another version, start again "
                                      "with --overwrite or another --out_dir")
        for name in given:
            if group[name] != "length" and given[name] != values.get(name):
                fail(f"--{name} {given[name]} differs from {values.get(name)} in {out_dir}; only run length and logging "
                     "may change on --resume")
    else:
        if os.path.exists(newest) and not given.get("overwrite"):
            fail(f"--out_dir {out_dir} already holds a run; give --resume, --overwrite or another --out_dir")
        device = pick_device(given.get("device", "auto"))
        preset = given.get("preset") or (ckpt["config"]["preset"] if ckpt else
                                         "gpu" if device.startswith("cuda") else "laptop")
        values = preset_values(preset, dataset, own_presets) | values | dict(preset=preset)
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if given.get(one):
            values[other] = 0  # a run counted in steps has no clock, so that it can be repeated exactly
    cfg = Config(**{k: v for k, v in (values | given | dict(out_dir=out_dir)).items() if k in fields})
    cfg.data_dir = os.path.abspath(cfg.data_dir)  # a checkpoint may be used from another folder
    cfg.data_file = cfg.data_file and os.path.abspath(cfg.data_file)

    check_task_flags(cfg.dataset, given)
    own = datasets.OPTIONS[cfg.dataset]
    for name in task_flags():
        if name not in own or getattr(cfg, name) is None:
            setattr(cfg, name, own.get(name))
    check(cfg)
    return cfg, ckpt


def add_flags(parser, fields) -> None:
    """Offer dataclass fields on a command line; what is not given stays absent."""
    for f in fields:
        owners = {d: o[f.name] for d, o in datasets.OPTIONS.items() if f.name in o}
        shown = ", ".join(f"{v} for {d}" for d, v in owners.items() if v not in (None, "")) or f.default
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else f.type.__name__)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {'-' if shown in ('', None) else shown})", **kind)


def task_flags() -> list[str]:
    """Names of the flags that belong to datasets."""
    return list(dict.fromkeys(name for options in datasets.OPTIONS.values() for name in options))


def add_task_flags(parser) -> None:
    add_flags(parser, [f for f in dataclasses.fields(Config) if f.name in task_flags()])


def check_task_flags(dataset: str, given: dict) -> None:
    """Refuse a flag of another dataset. Raises UsageError."""
    for name in given:
        if name in task_flags() and name not in datasets.OPTIONS[dataset]:
            fail(f"--{name} means nothing to --dataset {dataset}; leave it out")


def open_checkpoint(path: str) -> dict:
    """load_checkpoint, whose task and preset are known here. Raises CheckpointError."""
    ckpt = load_checkpoint(path)
    for name, known in (("dataset", datasets.OPTIONS), ("preset", SIZES)):
        if ckpt["config"][name] not in list(known):
            raise CheckpointError(f"{path}: its {name} {ckpt['config'][name]!r} is unknown here; it comes from another "
                                  "version")
    ckpt["config"].setdefault("variant", "ours")  # what there was before there were two
    return ckpt


def where(given: dict, config: dict) -> dict:
    """Where the data of a checkpoint with this config are, unless flags say otherwise: a text or folder of one's own stays
    the one it was trained on; everything else is looked for where this machine keeps its data."""
    own = {k: config[k] for k in ("data_file",) + ("data_dir",) * (config.get("dataset") == "images") if config.get(k)}
    return dict(data_dir=Config.data_dir) | own | {k: v for k, v in given.items() if k in ("data_dir", "data_file") and v}


def add_data_flags(parser) -> None:
    """For scripts that read a checkpoint's data again."""
    parser.add_argument("--data_dir", default="",
                        help=f"where the data is (default: {Config.data_dir}, for images the folder trained on)")
    parser.add_argument("--data_file", default="", help="the text of --dataset text (default: the one trained on)")


MOST_THREADS = 1024  # torch crashes on absurd numbers


def demand(name: str, value: float, low: float, high: float) -> None:
    """Refuse --name value unless low <= value <= high; NaN fails every comparison. Raises UsageError."""
    if not low <= value <= high:
        allowed = f"from {low} to {high:g}" if high < 1e15 else f"of at least {low}"
        fail(f"--{name} {value} is not allowed; give a number {allowed}")


def check(cfg) -> None:
    """Refuse values no run can mean. Raises UsageError naming the flag."""
    least = dict.fromkeys("d_model n_heads mem_tokens enc_layers dec_layers rnn_layers batch_size n_val log_every pairs runs "
                          "micro".split(), 1) | dict(run_len=2)
    most = dict(threads=MOST_THREADS, chain=1, decode_own=1, ema=1, enc_layers=1000, dec_layers=1000, rnn_layers=1000)
    for name, value in vars(cfg).items():
        if type(value) in (int, float):
            demand(name, value, least.get(name, 0), most.get(name, 10 ** 18))
    if cfg.lr == 0:
        fail(f"--lr {cfg.lr} is not allowed; give a number above 0, such as 1e-3")
    if cfg.batch_size % getattr(cfg, "micro", 1):
        fail(f"--batch_size {cfg.batch_size} is not a multiple of --micro {cfg.micro}; change one of them")
    if not cfg.steps and not cfg.minutes:
        fail("--steps and --minutes are both 0, so the run would never end; give one of them")
    if not cfg.head_dim and cfg.d_model % cfg.n_heads:
        fail(f"--d_model {cfg.d_model} is not a multiple of --n_heads {cfg.n_heads}; change one, or give --head_dim")
    if (cfg.head_dim or cfg.d_model // cfg.n_heads) % 2:
        fail(f"--head_dim {cfg.head_dim or cfg.d_model // cfg.n_heads} is odd; RoPE rotates pairs, make it even")
    if cfg.encoder == "causal" and cfg.ctx_len == 1:
        fail("--ctx_len 1 leaves a causal encoder one memory and no transition; give 0 (all) or at least 2")


def cli(main):
    """Run main(argv); turn what the user can mend into one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe that knows fewer characters than a text has
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (UsageError, datasets.DataError, CheckpointError, OSError) as e:
        line, code = str(e), 2
    except KeyboardInterrupt:  # Run.loop saves first; here there was nothing to save yet
        line, code = "interrupted", 130
    except (MemoryError, RuntimeError) as e:
        known = any(s in str(e) for s in ("out of memory", "allocate memory", "enough memory", "overflow"))
        if not known and type(e) is not MemoryError:
            raise
        line, code = f"out of memory ({str(e)[:200]}); give smaller numbers, --batch_size or sizes", 2
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def pick_device(name: str) -> str:
    """"auto" -> cuda, mps or cpu; anything else is checked. Raises UsageError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # torch raises half a dozen types
        fail(f"--device {name} cannot be used here ({(str(e) or repr(e)).splitlines()[0][:80]}); try --device cpu")
    return name
