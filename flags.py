"""The command line of the training scripts: a dataclass of flags, and where its values come from.

    cfg, ckpt = flags.parse("smt", Config, argv, __doc__)   # ckpt: where the run starts, or None
    cfg = flags.config("smt", Config, dataset="mnist")      # without a command line

A value comes from the command line; else, for task and networks, from the checkpoint that the run
starts from; else from presets.py. A script's own Config adds the flags of its method.
"""
import argparse
import dataclasses
import functools
import os
from dataclasses import dataclass

import data as datasets
import presets
import ranks
from checkpoints import CHOICES, CheckpointError, load_checkpoint, odd_heads, problem
from console import fail, flags_in, parser, pick_device, refuse
from sources.files import Data

GROUPS = {  # of flags, in the order of --help
    "task": "what is learnt; the options of another dataset are shown by --dataset NAME --help",
    "networks": None,
    "method": "how they learn; defaults are shown for --preset {} and --dataset {}",
    "run": "how long, where and how often; these flags alone may change with --resume",
}

USELESS = (  # flags, and the value of another one with which they change nothing
    ("rnn_layers", "rnn", "gru"), ("horizon", "times", 2),
    ("heads_part", "heads", 0), ("lambda_fut octaves", "futures", 0), ("lambda_past", "past", 0),
    ("lambda_heads", "heads", 0), ("heads heads_part", "lambda_heads", 0),
    ("futures octaves first heads past lambda_fut lambda_past detach_dec decode_own",
     "lambda_dec", 0),
    *(("timestamps", "dataset", name) for name in datasets.TEXTS))


def flag(help: str, group: str = "method", choices=None, default=dataclasses.MISSING):
    """A command-line flag as a dataclass field. Those of the groups "task" and "networks" come from
    a checkpoint where one is given; those without a default here have it in presets.py."""
    return dataclasses.field(default=default,
                             metadata=dict(help=help, group=group, choices=choices))


# A field for every option of a dataset; None where the dataset at hand has no such option. A text
# may move between two calls of a run, so where it lies is no part of the task.
Options = dataclasses.make_dataclass("Options", kw_only=True, fields=[
    (name, datasets.option_type(name),
     flag(about, "run" if name == "data_file" else "task", default=None))
    for name, about in datasets.HELP.items()])


@dataclass(kw_only=True)
class Config(Options):
    """Flags of every training script."""
    dataset: str = flag(", ".join(datasets.OPTIONS), "task", tuple(datasets.OPTIONS), "glyphs")

    rnn: str = flag("updater of the RNN", "networks", CHOICES["rnn"])
    encoder: str = flag("bidirectional: the paper's; causal: all in one pass",
                        "networks", CHOICES["encoder"])
    d_model: int = flag("width of all streams", "networks")
    n_heads: int = flag("H: attention heads", "networks")
    head_dim: int = flag("width of a head; 0 = d_model / H", "networks")
    mem_tokens: int = flag("K: memory tokens", "networks")
    enc_layers: int = flag("layers of the encoder", "networks")
    dec_layers: int = flag("layers of the decoder and the readout", "networks")
    rnn_layers: int = flag("layers of the updater", "networks")
    ctx_len: int = flag("Tc: the encoder reads so many tokens at most; 0 = all", "networks")
    fut_len: int = flag("Tf: the decoder predicts so many outputs; 0 = the sequence", "networks")
    mem_dim: int = flag("d: width of a memory token; 0 = d_model", "networks")
    heads: int = flag("F: linear heads predict the next F targets; 0 = none", "networks")
    past: int = flag("P: linear heads recall the last P inputs; 0 = none", "networks")
    timestamps: str = flag("who is told the time of a token, in tasks of one length", "networks",
                           CHOICES["timestamps"])

    preset: str = flag("sizes and recipe; empty = gpu on CUDA, else laptop", "method",
                       tuple(presets.PRESETS), "")
    seed: int = flag("seed of weights and batches", default=0)
    batch_size: int = flag("sequences a step")
    optimizer: str = flag("muon: for matrices, AdamW for the rest; adamw: for all",
                          choices=("muon", "adamw"))
    lr: float = flag("highest learning rate; adamw wants a quarter of muon's")
    warmup: float = flag("steps of linear warm-up; below 1: a part of the run")
    decay: float = flag("the rate falls to this part of lr, a cosine; 1 = it stays")
    ema: float = flag("average the weights with this decay; 0 = keep the newest")
    heads_part: float = flag("part of the memories whose heads are asked for F targets")
    compile: bool = flag("torch.compile the Transformer blocks", default=False)
    graph: bool = flag("replay updates as a CUDA graph; not tried yet", default=False)

    steps: int = flag("length of the run in optimiser steps; 0 = no limit", "run")
    minutes: float = flag("its length in minutes, all resumes together, of processor time if "
                          "one CPU thread runs; 0 = no limit", "run")
    stop_after: float = flag("end this call after so many minutes, resumable; 0 = never", "run",
                             default=0.0)
    device: str = flag("auto, cpu, cuda, cuda:1, mps ...", "run", default="auto")
    threads: int = flag("CPU threads; 0 = torch's choice", "run", default=0)
    data_dir: str = flag("where data files are (or $SMT_DATA_DIR)", "run",
                         default=os.environ.get("SMT_DATA_DIR", "data"))
    out_dir: str = flag("where the run writes; empty = runs/<script>-<dataset>", "run", default="")
    log_every: int = flag("steps between log lines", "run")
    eval_every: int = flag("steps between evaluations; 0 = only at the end", "run")
    n_val: int = flag("validation sequences of an evaluation", "run")
    ckpt_every: int = flag("steps between checkpoints; 0 = only at the end", "run")
    resume: bool = flag("continue the run in out_dir", "run", default=False)
    overwrite: bool = flag("replace the run in out_dir", "run", default=False)


def config(script: str, Flags, preset="laptop", dataset="glyphs", recipe=None, **changes):
    """A Flags, which is a Config, from a preset's recipe for the dataset, and `changes`."""
    recipe = recipe or functools.partial(presets.recipe, script)
    values = recipe(preset, datasets.kinds(dataset, changes.get("rnn"), changes.get("levels")))
    values |= dict(preset=preset, dataset=dataset) | changes
    names = [f.name for f in dataclasses.fields(Flags)]
    cfg = Flags(**{k: v for k, v in values.items() if k in names})
    cfg.data_dir = os.path.abspath(cfg.data_dir)  # a checkpoint may be used from another folder
    cfg.data_file = cfg.data_file and os.path.abspath(cfg.data_file)
    options = datasets.OPTIONS[dataset]
    for name in datasets.HELP:
        if name not in options or getattr(cfg, name) is None:
            setattr(cfg, name, options.get(name))
    return cfg


# ------------------------------------------------------------------------------ the command line

def parse(script: str, Flags, argv, doc: str, recipe=None, unused: tuple = ()):
    """argv -> (config, checkpoint to build the networks from, or None). With --resume both are the
    stored run's. Flags in `unused` mean nothing to the script; `recipe` is for one that presets.py
    does not know. Raises UserError, CheckpointError."""
    fields = {f.name: f for f in dataclasses.fields(Flags) if f.name not in unused}
    given = read(script, fields, argv, doc, recipe or functools.partial(presets.recipe, script))
    if given.get("resume") and given.get("overwrite"):
        fail("--resume continues a run and --overwrite replaces it; give one of them")
    values, ckpt = taken_from_checkpoint(given)
    dataset = values.get("dataset") or given.get("dataset") or Config.dataset
    out_dir = given.get("out_dir") or f"runs/{script}-{dataset}"
    if given.get("resume"):
        ckpt = stored_run(script, Flags, out_dir, given, fields)
        values = ckpt["config"] | dict(overwrite=False, stop_after=0.0)
    else:
        # links are followed: what they lead to would be replaced
        if ckpt and os.path.dirname(os.path.realpath(ckpt["path"])) == os.path.realpath(out_dir):
            fail(f"--out_dir {out_dir} holds {ckpt['path']}, where this run starts; give another")
        # for the first rank to look: to a slower one its files would be another run's
        there = [f for f in ("ckpt.pt", "best.pt", "config.json")
                 if not ranks.RANK and os.path.exists(os.path.join(out_dir, f))]
        if there and "ckpt.pt" not in there and not given.get("overwrite"):
            fail(f"--out_dir {out_dir} holds {there[0]} of a run without ckpt.pt; give "
                 "--overwrite or another --out_dir")
        if there and not given.get("overwrite"):
            fail(f"--out_dir {out_dir} already holds a run; give --resume, --overwrite or "
                 "another --out_dir")
        device = pick_device(given.get("device", "auto"))
        values["preset"] = given.get("preset") or (
            ckpt["config"]["preset"] if ckpt else
            "gpu" if device.startswith("cuda") else "laptop")
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if given.get(one):
            values[other] = 0  # a run counted in steps has no clock: it can be repeated exactly
    values = dict(dataset=dataset) | values | given | dict(out_dir=out_dir)
    cfg = config(script, Flags, recipe=recipe, **values)
    datasets.refuse_useless(cfg.dataset, given)
    refuse_nonsense(cfg)
    for names, other, value in USELESS:
        if getattr(cfg, other, None) == value:
            refuse(names, given, f"with --{other} {value}")
    return cfg, ckpt


def read(script: str, fields: dict, argv, doc: str, recipe) -> dict:
    """The flags that are given, by name. --help answers for the dataset and preset given with
    it."""
    dataset, preset = named(argv, "--dataset", Config.dataset), named(argv, "--preset", "laptop")
    if preset not in presets.PRESETS:
        preset = "laptop"  # the parser refuses it below
    options = datasets.OPTIONS.get(dataset, {})
    kinds = datasets.kinds(dataset, named(argv, "--rnn", ""), named(argv, "--levels", ""))
    defaults = {f.name: f.default for f in fields.values()} | options | recipe(preset, kinds)
    p = parser(f"{script}.py", doc)
    groups = {name: p.add_argument_group(name, about and about.format(preset, dataset))
              for name, about in GROUPS.items()}
    if "ckpt" in fields:
        groups["task"].description = groups["networks"].description = "come from --ckpt"
    for f in sorted(fields.values(), key=lambda f: f.name != "dataset"):  # which comes first
        group, default = f.metadata["group"], defaults[f.name]
        hidden = "ckpt" in fields and group in ("task", "networks") or \
            f.name in datasets.HELP and f.name not in options
        shown = "-" if default in ("", None) else default
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"],
            metavar=None if f.metadata["choices"] and f.name != "dataset" else f.type.__name__)
        groups[group].add_argument(
            f"--{f.name}", default=argparse.SUPPRESS, **how,
            help=argparse.SUPPRESS if hidden else f"{f.metadata['help']} (default: {shown})")
    return vars(p.parse_args(argv))


def named(argv, flag: str, default: str) -> str:
    """The value that follows a flag on the command line."""
    for word, following in zip(argv, [*argv[1:], default]):
        if word == flag or word.startswith(flag + "="):
            return following if word == flag else word.removeprefix(flag + "=")
    return default


def taken_from_checkpoint(given: dict) -> tuple[dict, dict | None]:
    """(task and networks of the checkpoint that --ckpt or --init names, the checkpoint)."""
    source = given.get("ckpt") or given.get("init")
    if not source:
        return {}, None
    ckpt = open_checkpoint(source)
    theirs = [f.name for f in dataclasses.fields(Config)
              if f.metadata["group"] in ("task", "networks")]
    for name in given:
        if name in theirs:
            fail(f"--{name} comes from the checkpoint {source}; leave it out, or train a new one")
    values = {k: v for k, v in ckpt["config"].items() if k in theirs}
    return values | data_places(given, ckpt["config"]), ckpt


def stored_run(script: str, Flags, out_dir: str, given: dict, fields: dict) -> dict:
    """The newest checkpoint of the run in out_dir, which these flags may continue."""
    ckpt = open_checkpoint(os.path.join(out_dir, "ckpt.pt"), Flags)
    if ckpt["script"] != script:
        fail(f"--out_dir {out_dir} holds a run of {ckpt['script']}.py; resume it with that script")
    for name in (name for name, f in fields.items() if f.metadata["group"] != "run"):
        if name not in ckpt["config"]:
            fail(f"{ckpt['path']}: does not say what --{name} was; it comes from another version, "
                 "start again with --overwrite or another --out_dir")
        then = ckpt["config"][name]
        if given.get(name, then) != then:
            fail(f"--{name} {given[name]} differs from {then} in {out_dir}; only run length and "
                 "logging may change on --resume")
    return ckpt


def refuse_nonsense(cfg) -> None:
    """Refuse values no run can mean. Raises UserError naming the flag."""
    if bad := problem(vars(cfg), dataclasses.fields(cfg)) or odd_heads(cfg):
        fail(bad)
    weights = [k for k in ("lambda_mse", "lambda_dyn", "lambda_dec", "lambda_unif")
               if hasattr(cfg, k)]
    if weights and not any(getattr(cfg, k) for k in weights):
        fail(f"--{', --'.join(weights)} are all 0, so nothing would be learnt; give one of them")
    asked = ("futures", "first", "heads") if hasattr(cfg, "decode_own") and cfg.lambda_dec else ()
    if asked and not any(getattr(cfg, k) for k in asked):
        fail("--futures, --first and --heads are all 0, so no memory need hold anything; give one "
             "of them")
    if getattr(cfg, "detach_dec", False) and not cfg.lambda_mse:
        fail("--lambda_mse 0 with --detach_dec leaves the RNN nothing to learn from; leave one of "
             "them out")
    if not getattr(cfg, "decode_own", True) and not cfg.lambda_dyn:
        fail("--lambda_dyn 0 with --no-decode_own leaves the RNN nothing to learn from; leave one "
             "of them out")
    if hasattr(cfg, "lambda_heads") and not cfg.first:
        fail("--first 0 leaves BPTT no output to learn from; give more than 0; 1 = all of them")
    if cfg.batch_size % getattr(cfg, "micro", 1):
        fail(f"--batch_size {cfg.batch_size} is not a multiple of --micro {cfg.micro}; "
             "change one of them")
    if getattr(cfg, "times", 0) == 1:
        fail("--times 1 leaves a step no transition; give 0 (all) or at least 2")
    if not cfg.steps and not cfg.minutes:
        fail("--steps and --minutes are both 0, so the run would never end; give one of them")
    if cfg.encoder == "causal" and cfg.ctx_len == 1:
        fail("--ctx_len 1 leaves a causal encoder one memory and no transition; "
             "give 0 (all) or at least 2")


def demand_fits(cfg, T: int, argv) -> None:
    """Refuse a number of times that somebody typed and that does not fit into T of them; presets
    are cut to them. Raises UserError naming the flag."""
    for name, most in dict(ctx_len=T, fut_len=T, heads=T, past=T - 1, times=T, horizon=T,
                           span=T - 1, truncate=T).items():
        if name in flags_in(argv) and getattr(cfg, name, 0) > most:
            fail(f"--{name} {getattr(cfg, name)} does not fit into sequences of {T}; give at most "
                 f"{most}")


# ---------------------------------------------------------------------------- checkpoints to read

def open_checkpoint(path: str, Flags=Config) -> dict:
    """load_checkpoint, whose config is held against the flags. Raises CheckpointError."""
    return load_checkpoint(path, dataclasses.fields(Flags))


def load_data(config: dict, device: str, ckpt: dict | None = None) -> Data:
    """The dataset a config (of a run or of a checkpoint) describes. Raises CheckpointError where
    the networks of `ckpt` were built for other sequences."""
    name = config["dataset"]
    options = {k: config.get(k) for k in datasets.OPTIONS[name]}
    task = datasets.load(name, data_dir=config["data_dir"], device=device, **options)
    there = ckpt and all(config.get(k) == ckpt["config"].get(k) for k in ("data_dir", "data_file"))
    if there and ckpt.get("data", "") not in ("", task.mark):  # its test part may have been learnt
        advice = "use the Python it was trained with, whose help it read" if name == "pydoc" else \
            "put them back, or name the place of others (--data_dir, --data_file)"
        raise CheckpointError(f"{ckpt['path']}: it has learnt from another text, or other "
                              f"pictures, than are there now; {advice}")
    if ckpt and any(ckpt["model"].get(k) != getattr(task, k) for k in ("vocab", "n_out", "T")):
        raise CheckpointError(f"{ckpt['path']}: its networks do not fit the sequences of {name} "
                              "that its config describes; it is damaged or of another version")
    return task


def data_places(given: dict, config: dict) -> dict:
    """Where the data of a checkpoint with this config are, unless flags say otherwise: one's own
    text or folder where it was, everything else where this machine keeps its data."""
    names = ("data_file", "data_dir") if config["dataset"] == "images" else ("data_file",)
    stored = {k: config[k] for k in names if config.get(k)}
    now = {k: v for k, v in given.items() if k in ("data_dir", "data_file") and v}
    return dict(data_dir=Config.data_dir) | stored | now


def add_data_flags(p) -> None:
    """For scripts that read a checkpoint's data again."""
    p.add_argument("--data_dir", default="",
                   help=f"where the data is (default: {Config.data_dir}; for images the folder "
                        "trained on)")
    p.add_argument("--data_file", default="",
                   help="the text of --dataset text (default: the one trained on)")
