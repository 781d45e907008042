"""The command line: finds the command's file, parses its flags, turns errors into one line and an exit code.

Each command is one file with a dataclass `Args` (its flags, documented) and `main(args) -> int | None`. A command with
sub-commands has a dictionary `COMMANDS: {name: (Args, main)}` instead; one whose flags depend on a file that another
flag names has `read_args(argv, prog) -> Args`. Knows nothing of what the commands do.

Exit codes: 0 done, 1 the input could not be served (one line says why), 2 wrong usage, 75 another process of a training
run was killed or stands still (start again), 130 interrupted, 143 terminated.
"""

import difflib
import importlib
import sys
from collections.abc import Callable

COMMANDS = {
    "answer": "answer questions about medical images",
    "serve": "answer over HTTP: OpenAI's protocol and our own",
    "evaluate": "score a checkpoint, or a file of predictions, on a data set",
    "pretrain": "train a model on images with captions, on one process or many",
    "finetune": "train a checkpoint to answer questions",
    "transcap": "write captions for images that have labels only",
    "convert": "translate checkpoints between ours, MISS, BLIP and Hugging Face",
    "quantize": "pack a checkpoint into int8 and int4",
    "data": "check and pack data sets",
    "doctor": "show what is installed and works here, and what to do where answering does not",
    "kernels": "list every operation's implementations; compile the GPU kernels without a GPU, or prove them on one",
    "bench": "time the operations against this machine's ceilings, compare two runs",
    "profile": "show where the time of an answer goes, by stage and operation, against this machine's ceilings",
    "explain": "show which implementation of each operation runs here, and why not the others",
}


def usage() -> str:
    import miss

    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        f"miss {miss.__version__}: medical visual question answering (research only, not for diagnosis)\n\n"
        f"usage: miss COMMAND [flags]      miss COMMAND --help\n\n{rows}"
    )


def run(argv: list[str]) -> int:
    """Runs `miss ARGV` and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        import miss

        print(miss.__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        return _usage_error(f"miss: no command named {name!r}", name, list(COMMANDS))
    module = importlib.import_module(f"miss.cli.{name}")
    args_type, main = getattr(module, "Args", None), getattr(module, "main", None)
    if hasattr(module, "COMMANDS"):
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: miss {name} {{{','.join(module.COMMANDS)}}} [flags]\n\n{(module.__doc__ or '').strip()}")
            return 0 if rest else 2
        if rest[0] not in module.COMMANDS:
            return _usage_error(f"miss {name}: no command named {rest[0]!r}", rest[0], list(module.COMMANDS))
        args_type, main = module.COMMANDS[rest[0]]
        name, rest = f"{name} {rest[0]}", rest[1:]
    assert args_type is not None and main is not None, f"miss.cli.{name} has neither Args and main nor COMMANDS"
    from miss.cli.flags import parse

    read = getattr(module, "read_args", None)
    prog, serve = f"miss {name}", main
    return _guarded(name, lambda: serve(read(rest, prog) if read else parse(args_type, rest, prog)))


def _usage_error(message: str, got: str, known: list[str]) -> int:
    close = difflib.get_close_matches(got, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    print(f"{message}{hint} (one of: {', '.join(known)})", file=sys.stderr)
    return 2


def _guarded(name: str, call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except (ValueError, OSError) as error:
        # The typed errors of every floor are ValueErrors; OSError is a file that is missing, denied or a full disk.
        print(f"miss {name}: {one_line(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    except ModuleNotFoundError as error:
        if (error.name or "miss").split(".")[0] == "miss":
            raise  # a fault of ours, not a package that is left to be installed
        print(f"miss {name}: needs the package {error.name}, which is not installed: run `make setup`", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"miss {name}: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__
