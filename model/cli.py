"""The command line: `gptkernels train | sample | data | convert | check | bench | kernels | tune | doctor | demo`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from model.config import describe, parse_override, preset_names, resolve
from model.usage import Parser, UsageError, as_usage

# 128 + the signal, as shells report it.
INTERRUPTED, PIPE_CLOSED = 130, 141

OVERVIEW = """\
examples:
  gptkernels demo                                          all of it in a few minutes
  gptkernels train shakespeare-cpu                         a preset
  gptkernels train shakespeare-cpu pos=sinusoidal lr=5e-4  a preset, changed
  gptkernels train tiny data=my.txt --print-config         what would be used, and where each value is from
  gptkernels train --resume runs/NAME                      go on with a run
  gptkernels sample runs/NAME "ROMEO:" --top-p 0.9
  gptkernels check --help, gptkernels bench --help         fast model against reference: right? and fast?
"""

TRAIN_HELP = """\
Settings are key=value, after a preset and over it; --print-config lists every key with its meaning. Among them:
  data=shakespeare | shakespeare:PATH_OR_URL | english | python | FILE | FOLDER | SHARDS     model=fast | reference
  pos=learned | sinusoidal | none    steps=2000    lr=1e-3    dtype=fp32 | bf16 | fp16    backend=auto | cpu | reference
The run folder (out=runs, name=...) gets config.toml, env.json, metrics.csv, metrics.jsonl, report.html,
loss.svg, samples.txt, last.pt and best.pt (with parallel=fsdp, folders beside these hold their tensors), and when it
stops the best weights as model.safetensors.
On many GPUs: torchrun --no-python --nproc-per-node 8 gptkernels train PRESET ...
Ctrl-C saves and says how to resume.
"""


DATA_HELP = """\
SOURCE: shakespeare | shakespeare:PATH_OR_URL | english | python | FILE | FOLDER, or a folder of shards to check and describe
examples:
  gptkernels data english --tokenizer bpe --vocab 4096     22 MB of English, fetched; then train data=data/english-bpe4096
  gptkernels data FOLDER --tokenizer gpt2:vocab.bpe        any UTF-8 files, more than memory holds too; GPT-2's own tokens
"""


CONVERT_HELP = """\
TARGET: hf:FOLDER for transformers' GPT2LMHeadModel.from_pretrained, or FILE.safetensors, a state_dict in nn.Linear's layout
sample and check take hf:FOLDER as well; train begins from it with init=hf:FOLDER. What the shapes in a file of others do not
tell is asked for: n_head=, act=, pos=.
"""


def make_parser() -> Parser:
    """The parser of every command but check and bench, which read their own arguments."""
    parser = Parser(
        prog="gptkernels",
        description="A GPT on own fused kernels: train it, sample from it, compare it with plain PyTorch.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int], words: str, epilog: str = "") -> Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"gptkernels {name} {words} [options]".replace("  ", " "),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # One list, so that options may stand anywhere between the words: see main.
        sub.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        return sub

    presets = ", ".join(preset_names())
    words = "[PRESET] [key=value ...]"
    text = f"train a model (presets: {presets}, or a .toml file), or go on with a run"
    sub = command("train", text, train_command, words, TRAIN_HELP)
    sub.add_argument("--resume", metavar="RUN", default="", help="a run folder: go on from its last checkpoint")
    sub.add_argument("--print-config", action="store_true", help="show every setting and its origin, train nothing")
    sub.add_argument("--quiet", action="store_true", help="print nothing while training")

    text = "write text with a trained model: RUN is a run folder or a checkpoint file, PROMPT the text to go on from"
    sub = command("sample", text, sample_command, "RUN [PROMPT]")
    sub.add_argument("--tokens", type=int, default=500, help="how many tokens to write (default 500)")
    sub.add_argument("--temperature", type=float, default=0.8, help="below 1 sharper, 0 the likeliest (default 0.8)")
    sub.add_argument("--top-k", type=int, default=0, help="only from the k likeliest tokens (default 0: all)")
    sub.add_argument("--top-p", type=float, default=1.0, help="only from the likeliest that hold this probability")
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    sub.add_argument("--last", action="store_true", help="the last checkpoint instead of the best one")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    sub.add_argument("--backend", default="auto", help="as in train, whatever the run was trained with (default auto)")

    text = "show the text that a data= setting means (default shakespeare), or make token shards of it"
    sub = command("data", text, data_command, "[SOURCE]", DATA_HELP)
    text = "make shards with this: bpe, gpt2:PATH_OR_URL, or a tokenizer.json, a merges file or a folder with one"
    sub.add_argument("--tokenizer", metavar="NAME", default="", help=text)
    sub.add_argument("--vocab", type=int, default=4096, help="tokens of a BPE trained here (default 4096)")
    sub.add_argument("--val-fraction", type=float, default=0.005, help="validation share of each end (default 0.005)")
    sub.add_argument("--out", default="", help="the new folder (default data/SOURCE-TOKENIZER)")
    text = (
        "put weights into another form: SOURCE is a run, a file of weights or hf:FOLDER (as transformers saves a GPT-2)"
    )
    command("convert", text, convert_command, "SOURCE TARGET [key=value]", CONVERT_HELP)
    command("check", "is the fast model the same function as the reference?", passed_on, "")
    text = "the kernels for GPUs, without one: registers, spills, tensor cores, bank conflicts"
    command("kernels", text, passed_on, "")
    command("tune", "measure which GEMM is faster on this GPU, ours or cuBLAS, and keep the answer", passed_on, "")
    command("bench", "how fast is it, beside plain PyTorch and torch.compile?", passed_on, "")
    command("doctor", "device, toolchains, and which backends work here and why the others do not", doctor_command, "")
    sub = command("demo", "train, check, measure and sample in a few minutes", demo_command, "")
    sub.add_argument("--steps", type=int, default=2000, help="training steps (default 2000)")
    sub.add_argument("--out", default="runs", help="folder for the run folder (default runs)")
    return parser


def train_command(args: argparse.Namespace) -> int:
    """`train`."""
    presets = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if len(presets) > 1:
        raise UsageError(f"train takes one preset, got {' and '.join(presets)}: settings are written key=value")
    if args.resume and presets:
        raise UsageError(f"--resume takes the run's own settings: leave {presets[0]!r} out")
    if args.resume and args.print_config:
        raise UsageError("--print-config shows a new run's settings: read config.toml in the run folder")
    if args.resume:
        from model.train import resume

        for override in overrides:
            as_usage(parse_override, override)
        result = resume(args.resume, overrides, quiet=args.quiet)
    else:
        if not args.words and not args.print_config:
            raise UsageError(f"train needs a preset ({', '.join(preset_names())}), settings, or --resume RUN")
        preset = presets[0] if presets else ""
        config, origins = as_usage(resolve, preset, overrides)
        if args.print_config:
            print(describe(config, origins))
            return 0
        from model.train import train

        result = train(config, label=Path(preset).stem, quiet=args.quiet)
    from model.ranks import leave

    leave()  # not where training fails: the others would be waited for
    return INTERRUPTED if result["interrupted"] else 0


def sample_command(args: argparse.Namespace) -> int:
    """`sample`: the prompt and what the model makes of it, written as it comes."""
    from model.checkpoint import LAST, load_model
    from model.generate import check_sampling, generate
    from model.state import choose_device
    from model.tokenizer import END_OF_TEXT

    as_usage(check_sampling, args.temperature, args.top_k, args.top_p)
    if args.tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {args.tokens}")
    if not -(2**63) <= args.seed < 2**64:
        raise UsageError(f"--seed must be a whole number of 64 bits, as torch has it, got {args.seed}")
    if not 1 <= len(args.words) <= 2:
        raise UsageError(f'sample takes RUN and one "PROMPT" in quotes, got {len(args.words)} words')
    device = choose_device(args.device)
    model, tokenizer, _ = load_model(args.words[0], LAST if args.last else None, backend=args.backend)
    model.to(device)
    text = args.words[1] if len(args.words) == 2 else tokenizer.start
    prompt = as_usage(tokenizer.encode, text).to(device)
    text = text.removeprefix(END_OF_TEXT)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    tokens = as_usage(generate, model, prompt, args.tokens, vocabulary=len(tokenizer), **sampling)
    sys.stdout.write(text)
    text_of = tokenizer.decoder()
    for token in tokens:
        sys.stdout.write(text_of(token))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def data_command(args: argparse.Namespace) -> int:
    """`data`: what a text is, and its beginning; or token shards, made or checked."""
    from model.data import load_text
    from model.fetch import cache_folder
    from model.files import user_path
    from model.prepare import prepare, summary
    from model.shards import holds_shards
    from model.tokenizer import CharTokenizer

    if len(args.words) > 1:
        raise UsageError(f"data takes one source, got {len(args.words)}")
    source = (args.words or ["shakespeare"])[0]
    made = user_path(source)
    if args.tokenizer or holds_shards(made):
        if args.tokenizer:
            made = prepare(source, args.tokenizer, args.vocab, args.out, args.val_fraction)
        print(summary(made, written=bool(args.tokenizer)))
        return 0
    text = load_text(source)
    characters = CharTokenizer.of_text(text.text).characters
    print(f"source      {text.source}")
    print(f"size        {len(text.text):,} characters, {text.text.count(chr(10)):,} lines")
    print(f"vocabulary  {len(characters)} characters: {characters!r}")
    print(f"sha256      {text.sha256}")
    print(f"cache       {cache_folder()}")
    print(f"\n{text.text[:400]}")
    return 0


def convert_command(args: argparse.Namespace) -> int:
    """`convert`."""
    from model.convert import convert

    places = [word for word in args.words if "=" not in word]
    if len(places) != 2:
        raise UsageError(f"convert takes SOURCE and TARGET, got {len(places)} words (see gptkernels convert --help)")
    print(convert(places[0], places[1], [word for word in args.words if "=" in word]))
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    """`doctor`."""
    from model.doctor import print_report

    print_report()
    return 0


def demo_command(args: argparse.Namespace) -> int:
    """`demo`."""
    from model.demo import demo

    return demo(args.steps, args.out)


def passed_on(args: argparse.Namespace) -> int:
    """check and bench never reach the parser: see main."""
    raise AssertionError(args.command)


def hand_over(command: str, argv: list[str]) -> int:
    """Run `check`, `kernels`, `tune` or `bench`, which parse their own arguments."""
    if command == "check":
        from model.equivalence import main as check

        return check(argv)
    if command == "kernels":
        from gptkernels.static_table import main as kernels

        return kernels(argv)
    if command == "tune":
        from gptkernels.tune import main as tune

        return tune(argv)
    from benchmarks.cli import main as bench

    return bench(argv)


def dispatch(argv: list[str]) -> int:
    """Parse the command line and run its command."""
    if argv and argv[0] in ("check", "kernels", "tune", "bench"):
        return hand_over(argv[0], argv[1:])
    parser = make_parser()
    args, later = parser.parse_known_args(argv)  # argparse leaves words over that follow an option
    if unknown := [word for word in later if word.startswith("-")]:
        raise UsageError(f"unknown option {unknown[0]} (see gptkernels {args.command or ''} --help)")
    if args.command is None:
        parser.print_help()
        return 2
    args.words += later
    if args.words and args.command in ("doctor", "demo"):
        raise UsageError(f"{args.command} takes no {args.words[0]!r} (see gptkernels {args.command} --help)")
    return int(args.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 for an error; 2 for a wrong command line, and for a check that could not be made (1 says that the models
    differ); 130 after Ctrl-C; 141 when the reader of the output has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may have characters that a terminal has not
    words = [word for word in words if word != "--debug"]
    try:
        status = dispatch(words)
        sys.stdout.flush()
        return status
    except SystemExit as exit:  # argparse's, after --help or an error that it has printed
        return exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `gptkernels sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        return PIPE_CLOSED
    except (UsageError, ValueError, TypeError, RuntimeError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"gptkernels: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) or words[:1] == ["check"] else 1
