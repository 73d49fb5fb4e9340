"""``rkvlmctl``: argv to calls of the daemon, and their outcome to an exit status."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd import __version__
from rkvlmd.ctl import model_commands, orders, render
from rkvlmd.ctl.client import Client, CtlError, RefusedError

if TYPE_CHECKING:
    from rkvlmd.ctl.chat import Chat

_EPILOG = """\
exit status:
  0 done    1 failed    2 wrong usage    3 no daemon    4 refused (no rights)

with --json, one JSON object on standard output:
  status             {"version", "pid", "uptime", "models": [...], ...}
  models             {"models": [{"name", "state", "progress", "detail", ...}]}
"""
_EPILOG += orders.EPILOG
_EPILOG += """\
  jobs               {"jobs": [{"id", "client", "model", "phase", "age", ...}]}
  cancel             {"cancelled": ID}
  ask                the response of the OpenAI endpoint
  doctor             {"loads", "worst", "findings": [{"id", "status", "what", "says",
                     "todo", "facts"}]}; status: ok, note, warn, stop
  import             {"model", "folder", "from", "family", "why", "notes": [{"key", "says",
                     "todo"}], "unverified", ...}; error code undecided: "candidates"
  check              {"model", "good", "findings": [{"status", "key", "says", "todo"}]}
  show               {"name", "family", "engines", "pictures", "context", "capabilities",
                     "warnings", ...}; without NAME {"models": [...]}
  top                {"busy", "tokens_per_second", "running", "waiting", "npu", "models",
                     "jobs"}: over one --interval; rates per second, shares 0 to 1
  bench              {"model", "soc", "source", "figures": [{"name", "unit", "here",
                     "published", "ratio", "runs"}]}
  any failure        {"error": {"code", "message", "param"}}
keys may be added; none changes its meaning. states: absent, loading, ready,
unloading, failed. ages are seconds, sizes are bytes. doctor, import, check and show ask no
daemon; doctor exits with 1 if something stops an installed model from loading,
check if a model's files are not what its manifest says.

environment:
  RKVLMD_API_KEY     the key that "ask" sends, where the server wants one
  NO_COLOR           no colour
"""
#: Where to look in a model and a job, for people; scripts get everything.
_MODELS = ("name", "state", "progress", "family", "context", "memory_bytes", "engines", "detail")
_JOBS = (
    "id",
    "client",
    "model",
    "priority",
    "phase",
    "age",
    "pictures",
    "prompt_tokens",
    "completion_tokens",
)
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="rkvlmctl",
        description="Look at and control a running rkvlmd.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"rkvlmctl {__version__}")
    top.set_defaults(control=None, json=False)
    # Before the command and after it; the default is set once, or the second would undo the first.
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for place in (top, shared):
        place.add_argument(
            "--control", type=Path, metavar="PATH", help="the daemon's control socket",
            default=argparse.SUPPRESS,
        )  # fmt: skip
        place.add_argument(
            "--json", action="store_true", help="print JSON for scripts", default=argparse.SUPPRESS
        )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what, parents=[shared])

    command("status", "show the daemon, its models and its processes")
    command("models", "list the installed models")
    orders.add(command)
    command("jobs", "list the requests under way")
    command("cancel", "end a request").add_argument("id", metavar="ID")
    ask = command("ask", "ask a model, about pictures if you like")
    ask.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", dest="images",
        help="a picture, before the prompt; may be given more than once",
    )  # fmt: skip
    ask.add_argument("--model", metavar="NAME", help="default: the server's default model")
    ask.add_argument("--max-tokens", type=_count, metavar="N", help="longest answer, in tokens")
    ask.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    think = ask.add_mutually_exclusive_group()
    think.add_argument(
        "--think", action="store_true", default=None,
        help="have the model think before it answers; its thoughts go to standard error",
    )  # fmt: skip
    think.add_argument(
        "--no-think", action="store_false", dest="think", help="have it answer at once"
    )
    ask.add_argument("prompt", metavar="PROMPT")
    top_ = command("top", "watch the requests, the engine and the NPU until interrupted")
    top_.add_argument("--once", action="store_true", help="show it once and leave")
    top_.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="pause; default: 1"
    )
    bench = command("bench", "measure a model, beside the figures that Rockchip publishes")
    bench.add_argument("--model", metavar="NAME", help="default: the server's default model")
    bench.add_argument("--repeats", type=_count, default=3, metavar="N", help="default: 3")
    bench.add_argument(
        "--tokens", type=_count, default=64, metavar="N", help="longest answer; default: 64"
    )
    bench.add_argument("--like", default="", metavar="MODEL", help="whose published figures")
    bench.add_argument("--soc", default="", metavar="SOC", help="default: this machine's")
    for one in (top_, bench):
        one.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    model_commands.add(command)
    doctor = command("doctor", "look at this machine, its NPU and the installed models; no daemon")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="the settings of the daemon")
    doctor.add_argument("--models", type=Path, metavar="DIR", help="the folder of model folders")
    doctor.add_argument(
        "--root", type=Path, metavar="DIR", default=Path("/"), help="look at the files below DIR"
    )
    return top


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be 0.05 to 3600")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status (2 leaves through ``argparse``)."""
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    try:
        if args.command == "doctor":
            from rkvlmd.ctl import doctor  # it reads files that the other commands do not need

            return doctor.run(args.config, args.models, args.root, as_json=args.json)
        if args.command in model_commands.COMMANDS:
            return model_commands.run(args)
        with Client(args.control) as client:
            status = _run(client, args)
            sys.stdout.flush()
            return status
    except CtlError as error:
        if args.json:
            said = {"code": error.code, "message": error.message, "param": error.param}
            _print_json({"error": said | error.details})
        print(f"rkvlmctl: {render.plain(error.message)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if args.command in orders.WATCHED:
            print(f"rkvlmctl: {orders.interrupted(args.command)}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has seen enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE


def _run(client: Client, args: argparse.Namespace) -> int:
    if args.command == "ask":
        return _ask(client, args)
    if args.command == "bench":
        return _bench(client, args)
    if args.command == "top":
        from rkvlmd.ctl import top  # it reads the board's files, which other commands do not need

        return top.run(
            client, interval=args.interval, once=args.once, as_json=args.json, root=args.root,
            out=sys.stdout,
        )  # fmt: skip
    if args.command in orders.NAMES:
        result = orders.run(client, args)
    else:
        result = client.call(args.command, {"id": args.id} if args.command == "cancel" else {})
    if args.json:
        _print_json(result)
    else:
        print(_for_people(args.command, result))
    return orders.status(args.command, result)


def _for_people(command: str, result: dict[str, Any]) -> str:
    colour = render.wants_colour(sys.stdout)
    if command == "status":
        return render.status(result, colour=colour)
    if command == "models":
        rows = [orders.model_row(model) for model in result.get("models", [])]
        return render.table(rows, _MODELS, colour=colour) if rows else "no models are installed"
    if command == "jobs":
        rows = result.get("jobs", [])
        return render.table(rows, _JOBS, colour=colour) if rows else "no requests are under way"
    if command == "cancel":
        return f"cancelled {render.cell('id', result.get('cancelled'))}"
    return orders.for_people(command, result)


def _endpoint(client: Client) -> tuple[Chat, dict[str, Any]]:
    """Return the HTTP endpoint, and what the daemon says of it."""
    from rkvlmd.ctl import chat  # it imports http.client, which the other commands do not need

    server = client.call("http")
    if not server.get("address"):
        raise CtlError("the HTTP endpoint does not listen", code="shutting_down")
    key = os.environ.get("RKVLMD_API_KEY", "")
    if server.get("keys") and not key:
        message = "this server wants an API key: set RKVLMD_API_KEY"
        raise RefusedError(message, code="invalid_api_key")
    patience = float(server.get("job_seconds", 300))
    return chat.Chat(str(server.get("address", "")), key=key, patience=patience), server


def _bench(client: Client, args: argparse.Namespace) -> int:
    from rkvlmd.ctl import bench

    endpoint, _ = _endpoint(client)
    models = client.call("models").get("models", [])
    chosen = [
        m for m in models if m.get("name") == args.model or (not args.model and m.get("default"))
    ]
    if not chosen:
        raise CtlError("there is no such model", code="model_not_found", param="model")

    def pids() -> dict[str, int]:
        children = client.call("status").get("children", [])
        ours = (f"decoder:{chosen[0]['name']}", f"encoder:{chosen[0]['name']}")
        return {c["name"]: c["pid"] for c in children if str(c.get("name")).startswith(ours)}

    report = bench.measure(
        endpoint, chosen[0], pids, repeats=args.repeats, tokens=args.tokens, like=args.like,
        soc=args.soc, root=args.root, tell=bench.progress,
    )  # fmt: skip
    if args.json:
        _print_json(report)
    else:
        print(render.plain(bench.screen(report)))
    return 0


def _ask(client: Client, args: argparse.Namespace) -> int:
    from rkvlmd.ctl import chat

    endpoint, server = _endpoint(client)
    most = int(server.get("max_image_bytes", 20 << 20))
    pictures = [chat.picture(file, most) for file in args.images]
    body: dict[str, Any] = {"messages": [chat.user_turn(args.prompt, pictures)]}
    if args.model is not None:
        body["model"] = args.model
    if args.max_tokens is not None:
        body["max_tokens"] = args.max_tokens
    if args.think is not None:
        body["chat_template_kwargs"] = {"enable_thinking": args.think}
    if args.json:
        _print_json(endpoint.whole(body))
        return 0
    chunks = [chat.chunk_of(endpoint.whole(body))] if args.no_stream else endpoint.stream(body)
    _print_stream(map(chat.said_by, chunks), thoughts=bool(args.think))
    return 0


def _print_stream(pieces: Iterable[tuple[str, str]], *, thoughts: bool) -> None:
    """Print what a model says, (thoughts, text) each; the thoughts to standard error."""
    thought = started = False
    try:
        for thinks, says in pieces:
            thought = thought or bool(thinks)
            if thinks and thoughts:
                print(render.plain(thinks), end="", file=sys.stderr, flush=True)
            if says and not started and thought and thoughts:
                print("\n", file=sys.stderr, flush=True)
            started = started or bool(says)
            print(render.plain(says), end="", flush=True)
    finally:
        if started:
            print()
    if thought and not started:
        print(
            "rkvlmctl: the answer ended in the model's thoughts;"
            " allow more with --max-tokens, or take --no-think",
            file=sys.stderr,
        )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
