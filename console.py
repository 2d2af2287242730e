"""How the scripts talk to whoever runs them: every mistake is one line and exit code 2.

    import console                        # before torch: Ctrl-C during imports is one line, too
    p = console.parser("sample.py", __doc__)
    console.demand("n", a.n, 0, 100)      # refuses --n -1
    console.cli(main)                     # runs main(argv), and turns mistakes into one line
"""
import argparse
import functools
import os
import sys


def excepthook(kind, *error):
    """For Ctrl-C while torch is imported, which takes seconds."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *error)


sys.excepthook = excepthook

# A thread that waits for the others soon sleeps. By default it spins for milliseconds, and where
# another process is busy, too, a step takes thirty times as long (two cores, two threads; on idle
# ones this costs 7 %). GNU's OpenMP reads it when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# torch imports numpy from C, which would swallow Ctrl-C: it comes first, by itself
import numpy  # noqa: E402, F401
import torch  # noqa: E402

from sources.files import UserError  # noqa: E402


def parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help fits 100 columns and whose mistakes are UserErrors."""
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=100,
                               max_help_position=26)
    p = argparse.ArgumentParser(prog=prog, usage="python %(prog)s [flags]", description=doc,
                                allow_abbrev=False, formatter_class=layout)
    p.error = fail  # one line instead of a usage block
    return p


def fail(message: str):
    raise UserError(message)


def demand(name: str, value: float, low: float, high: float) -> None:
    """Refuse --name value unless low <= value <= high; NaN fails every comparison."""
    if not low <= value <= high:
        fail(f"--{name} {value} is not allowed; give a number from {low:g} to {high:g}")


def path(text: str) -> str:
    """The type of a flag that names a file or folder: any name but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give one or leave the flag out")
    return text


def flags_in(argv) -> set[str]:
    """The names of the flags on a command line."""
    return {word[2:].partition("=")[0].removeprefix("no-") for word in argv if word[:2] == "--"}


def refuse(names: str, flags, why: str) -> None:
    """Refuse those of `names` that are among the flags given: they change nothing here."""
    for name in names.split():
        if name in flags:
            fail(f"--{name} means nothing {why}; leave it out")


def pick_device(name: str) -> str:
    """"auto" -> cuda, mps or cpu; anything else is tried. Raises UserError."""
    # cuDNN's attention makes a plan for each shape it meets, for a tenth of a second or more, and a
    # curriculum meets hundreds of shapes; the other kernels make none
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        return ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # torch raises half a dozen types
        reason = (str(e) or repr(e)).splitlines()[0][:80]
        fail(f"--device {name} cannot be used here ({reason}); try --device cpu")
    return name


def hush() -> None:
    """Nobody reads what is printed any more: from here on it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cli(main) -> None:
    """Run main(argv); turn what the user can mend into one line on stderr and exit code 2."""
    # closed by whoever called: the next file opened would have its number, and get what is printed
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe that knows fewer characters than a text
    code = 2
    try:
        main(sys.argv[1:])
        return sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left
        return hush()
    except (UserError, OSError) as e:
        line = str(e)
    except KeyboardInterrupt:  # a training run saves first; here there was nothing to save yet
        line, code = "interrupted", 130
    except (MemoryError, RuntimeError) as e:
        signs = "out of memory", "allocate memory", "enough memory", "ALLOC_FAILED", "overflow"
        if not any(s in str(e) for s in signs) and type(e) is not MemoryError:
            raise
        line = f"out of memory ({str(e)[:200]}); train with a smaller --batch_size or smaller " \
            "sizes (bptt.py: --recompute 28); elsewhere ask for less: --n, --n_test, --length"
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(line.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it is what could not be written; the interpreter would try again at its end
        hush()
    sys.exit(code)
