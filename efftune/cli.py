"""The command line: `efftune train | compare | verify | methods | info | bench | export | merge | delta |
replay`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efftune.errors import EfftuneError

if TYPE_CHECKING:
    from efftune.methods import Method


RANK = 16  # of --as lora


def main(argv: list[str] | None = None) -> int:
    """Runs one command. The library's own errors are one sentence on stderr and exit code 1."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except EfftuneError as error:
        print(f"efftune: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "datasets", "tokenizers", "tqdm", "matplotlib"):
            raise
        print(f"efftune: {error.name} is missing; install it with: pip install 'efftune[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nefftune: interrupted; efftune train --resume with the same --out continues the run.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    from efftune.train.config import add_options

    top = argparse.ArgumentParser(prog="efftune", description="Memory-efficient fine-tuning on one GPU, or none.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune a model; with no options, a small one in a few minutes")
    add_options(train)
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train under several recipes: loss, saved bytes, peak, tokens/s")
    compare.add_argument("--recipes", nargs="+", required=True, metavar="RECIPE")
    add_options(compare, without=("recipe", "resume"))
    compare.set_defaults(run=_compare)

    verify = commands.add_parser("verify", help="measure bias and variance of a recipe's gradients; fails if biased")
    verify.add_argument("--seeds", type=int, default=32, metavar="N", help="draws of one batch's gradient [32]")
    verify.add_argument("--batches", type=int, default=8, metavar="N", help="batches that tell SGD's own noise [8]")
    verify.add_argument(
        "--max-bias", type=float, default=0.02, metavar="X", help="of a gradient's norm; beyond it it fails [0.02]"
    )
    add_options(verify, without=("resume",))
    verify.set_defaults(run=_verify)

    methods = commands.add_parser("methods", help="what a recipe can be made of; with names, all about these methods")
    methods.add_argument("names", nargs="*", metavar="NAME", help="a method, as recipes name it")
    methods.set_defaults(run=_methods)
    commands.add_parser("info", help="versions, and operator x backend: available, or why not").set_defaults(run=_info)

    bench = commands.add_parser("bench", help="run the microbenchmarks of a checkout", add_help=False)
    bench.add_argument("name", nargs="?", help="one of bench/*.py; without it they are listed")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="options of that benchmark")
    bench.set_defaults(run=_bench)

    for name, run, text in (
        ("export", _export, "write what a run trained, as its newest checkpoint has it (a PEFT adapter for LoRA)"),
        ("merge", _merge, "write the whole trained model as a plain Hugging Face checkpoint"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", metavar="RUN", help="run directory")
        command.add_argument("--out", required=True, help="folder to write; it must be empty or not exist")
        command.set_defaults(run=run)
        if name == "export":
            command.add_argument(
                "--seed-log",
                action="store_true",
                help="of a zeroth-order run: one file, 16 bytes a step (ferret: 4 a number); --out names it",
            )
            command.add_argument(
                "--as",
                dest="kind",
                choices=("shira", "lora"),
                help="a PEFT adapter of the entries or columns that trained, or of the nearest matrices of a low rank, "
                "and how near they are",
            )
            command.add_argument("--rank", type=int, metavar="R", help="of --as lora [16]")

    delta = commands.add_parser(
        "delta",
        help="of runs with recipes like shira, lift or s2ft: thin out what they trained, add and subtract it",
        description="Reads sparse.safetensors, which recipes like shira, lift and s2ft write. What is left of the "
        "changes of each layer is added up over the folders and written. The model that the runs began with is always "
        "needed: of its weights a file has a checksum, over the places that it has itself, and in 16 bits it holds "
        "trained weights.",
    )
    delta.add_argument("folders", nargs="+", metavar="FOLDER", help="what tuner.save or efftune export wrote, or a run")
    delta.add_argument("--subtract", nargs="+", default=[], metavar="FOLDER", help="what is taken off the sum")
    delta.add_argument("--model", required=True, help="model folder or Hugging Face name; 'default': the small model")
    delta.add_argument("--out", required=True, help="folder to write; it must be empty or not exist")
    delta.add_argument(
        "--keep",
        type=float,
        metavar="X",
        help="share of each layer's changes that stays, the largest; others become 0",
    )
    delta.add_argument(
        "--drop-largest",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the very largest ones, which become 0 first [0]",
    )
    delta.add_argument(
        "--ternary",
        action="store_true",
        help="make each change sign * alpha * the standard deviation of all changes of its layer: one bit in the file",
    )
    delta.add_argument("--alpha", type=float, metavar="X", help="of --ternary [1]")
    delta.add_argument(
        "--as",
        dest="kind",
        choices=("sparse", "model", "shira", "lora"),
        help="write a sparse folder again, a whole model, or an adapter of PEFT's [of one folder: sparse; of several, "
        "or with --subtract: model]",
    )
    delta.add_argument("--rank", type=int, metavar="R", help="of --as lora [16]")
    delta.set_defaults(run=_delta)

    replay = commands.add_parser("replay", help="make the model that a seed log describes, from its base model")
    replay.add_argument("base", metavar="BASE", help="model folder or Hugging Face name; 'default': the small model")
    replay.add_argument("log", metavar="LOG", help="file that efftune export --seed-log has written")
    replay.add_argument("out", metavar="OUT", help="folder to write; it must be empty or not exist")
    replay.set_defaults(run=_replay)
    return top


def _train(arguments: argparse.Namespace) -> None:
    from efftune.train.config import given_options
    from efftune.train.run import train

    train(given_options(arguments))


def _compare(arguments: argparse.Namespace) -> None:
    from efftune.measure.compare import compare
    from efftune.train.config import given_options

    compare(arguments.recipes, given_options(arguments))


def _verify(arguments: argparse.Namespace) -> None:
    from efftune.measure.verify import verify
    from efftune.train.config import given_options

    verify(given_options(arguments), arguments.seeds, arguments.batches, arguments.max_bias)


def _methods(arguments: argparse.Namespace) -> None:
    from efftune.methods import available
    from efftune.recipe import method_class

    if arguments.names:
        print("\n\n".join(_everything_about(method_class(name)) for name in arguments.names))
        return
    for method in available().values():
        print(_signature(method))
        first, _, _ = inspect.cleandoc(method.__doc__ or "").partition("\n\n")
        print(textwrap.fill(" ".join(first.split()), 100, initial_indent="    ", subsequent_indent="    "))


def _everything_about(method: type[Method]) -> str:
    """The signature, the docstrings of the method and of its family, the settings, and the name of its page."""
    from efftune.methods import Method

    family = [cls for cls in method.__mro__ if issubclass(cls, Method) and cls is not Method]
    texts = [inspect.cleandoc(cls.__doc__) for cls in family if cls.__doc__]
    settings = [f"    {field.name}: {_type(field)}{_default(field)}" for field in dataclasses.fields(method)]
    parts = [_signature(method), *texts, "\n".join(["Settings:", *(settings or ["    none"])])]
    if method.__module__.startswith("efftune."):
        parts.append(f"Page: docs/methods/{method.name}.md")
    return "\n\n".join(parts)


def _signature(method: type[Method]) -> str:
    return f"{method.name}({', '.join(field.name + _default(field, '=') for field in dataclasses.fields(method))})"


def _type(field: dataclasses.Field) -> str:
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def _default(field: dataclasses.Field, equals: str = " = ") -> str:
    """As it stands behind the name of a setting; nothing where a recipe has to give one."""
    if field.default_factory is not dataclasses.MISSING:
        return f"{equals}{field.default_factory()!r}"
    return "" if field.default is dataclasses.MISSING else f"{equals}{field.default!r}"


def _info(arguments: argparse.Namespace) -> None:
    from efftune.info import report

    print(report())


def _bench(arguments: argparse.Namespace) -> None:
    import runpy

    import efftune

    folder = Path(efftune.__file__).resolve().parents[1] / "bench"
    scripts = sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "harness", "tables"))
    if not scripts:
        raise EfftuneError("Benchmarks are not installed with the package; run this in a checkout (pip install -e .).")
    if arguments.name in (None, "-h", "--help"):
        print("efftune bench NAME [options], where NAME is one of: " + ", ".join(scripts))
        return
    if arguments.name not in scripts:
        raise EfftuneError(f"There is no benchmark '{arguments.name}'; there is {', '.join(scripts)}.")
    sys.path.insert(0, str(folder.parent))
    sys.argv = [f"bench.{arguments.name}", *arguments.rest]
    runpy.run_module(f"bench.{arguments.name}", run_name="__main__")


def _export(arguments: argparse.Namespace) -> None:
    from efftune.train import run, rundir

    if arguments.seed_log:
        from efftune.train.replay import export_log

        out = Path(arguments.out)
        if out.exists():
            raise EfftuneError(f"{out} exists already; give another --out.")
        with rundir.writing(out):
            count, left = export_log(arguments.source, out)
        print(f"{out} holds the {count:,} directions of {arguments.source} in {out.stat().st_size:,} bytes.")
        if left:
            print(f"The last {left} steps are not in it: training ended before their round did.")
        return
    out = rundir.choose(arguments.out, resume=False, kind="export")
    rank = _setting(arguments.rank, RANK, arguments.kind == "lora", "--rank", "--as lora")
    tuner, _ = run.finished(arguments.source)
    with rundir.writing(out):
        if arguments.kind == "lora":
            from efftune.interop.svd import save_lora

            print(_errors(save_lora(tuner, out, rank)))
        else:
            tuner.save(out, arguments.kind)
    print(f"{out} holds what {arguments.source} trained ({tuner.recipe}).")


def _setting(value: Any, default: Any, asked: bool, name: str, of: str) -> Any:
    """What an option gives that another one has to go with. Raises: EfftuneError where it stands alone."""
    if value is not None and not asked:
        raise EfftuneError(f"{name} is a setting of {of}; add that, or leave {name} out.")
    return default if value is None else value


def _errors(errors: dict[str, float]) -> str:
    layers = [f"{error:8.4f}  {name}" for name, error in errors.items() if name]
    return "\n".join(["‖ΔW - BA‖ / ‖ΔW‖", *layers, f"{errors['']:8.4f}  of all layers together"])


def _delta(arguments: argparse.Namespace) -> None:
    from efftune.train import deltas, rundir

    out = rundir.choose(arguments.out, resume=False, kind="delta")
    kind = arguments.kind or ("sparse" if len(arguments.folders) == 1 and not arguments.subtract else "model")
    alpha = _setting(arguments.alpha, 1.0, arguments.ternary, "--alpha", "--ternary")
    rank = _setting(arguments.rank, RANK, kind == "lora", "--rank", "--as lora")
    edit = deltas.Edit(arguments.keep, arguments.drop_largest, alpha if arguments.ternary else None)
    about = deltas.delta(arguments.model, arguments.folders, arguments.subtract, edit, out, kind, rank)
    if about.errors:
        print(_errors(about.errors))
    print(f"{out} holds {about.entries:,} changes of {about.layers} layers of {arguments.model}, as {WRITTEN[kind]}.")


WRITTEN = {
    "sparse": "a sparse folder; efftune.load takes it",
    "model": "a whole model; from_pretrained takes it",
    "shira": "a SHiRA adapter of PEFT's",
    "lora": "a LoRA adapter of PEFT's",
}


def _merge(arguments: argparse.Namespace) -> None:
    from efftune.train import run, rundir
    from efftune.train.models import quiet

    out = rundir.choose(arguments.out, resume=False, kind="merge")
    tuner, tokenizer = run.finished(arguments.source)
    with rundir.writing(out), quiet():
        tuner.merge().save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"{out} holds the merged model; from_pretrained('{out}') loads it.")


def _replay(arguments: argparse.Namespace) -> None:
    from efftune.train import rundir
    from efftune.train.replay import replay

    out = rundir.choose(arguments.out, resume=False, kind="replay")
    about = replay(arguments.base, arguments.log, out)
    done, count = about["replayed"], about["count"]
    cut = "" if done == count else f" The log is cut short: it had {count:,} when it was written."
    print(f"{out} holds {arguments.base} after {done:,} directions of '{about['recipe']}'.{cut}")


if __name__ == "__main__":
    sys.exit(main())
