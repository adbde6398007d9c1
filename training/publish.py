"""Publish a run on the Hub: `python training/publish.py runs/moons --hub_model_id user/name`.

Exit codes: 0 published; 1 the model does not load in the three ways, nothing was sent; 2 a mistake in the command, or
the run is incomplete; 3 the Hub refused or failed: the run is unchanged (with a Space that fails, the model is
published, and the message says so). If the same command can succeed later, it is
printed; otherwise the message says what to change. Nothing is created on the Hub for a run that cannot be published.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.hub import check, client, push


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Publish a run on the Hugging Face Hub.", allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--hub_model_id", required=True, help='"user/name"; created if it does not exist')
    parser.add_argument("--space", help='"user/name" of a Space with a demo of the model; created if it does not exist')
    parser.add_argument("--hub_private_repo", action="store_true", help="create the repository as private")
    parser.add_argument("--revision_tag", help="tag of the commit, such as v1; default: made from a hash of the files")
    parser.add_argument(
        "--license",
        help="license of the weights, by its identifier on the Hub, such as mit or cc-by-4.0; default: apache-2.0 for "
        "the moons, otherwise unknown",
    )
    parser.add_argument("--fp16", action="store_true", help='also publish half-precision weights, for variant="fp16"')
    parser.add_argument("--hub_timeout", type=float, default=600, help="seconds for all requests; default: 600")
    parser.add_argument("--dry_run", action="store_true", help="show the files and the card, and send nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if not args.hub_timeout > 0:
        print(f"publish.py: hub_timeout is {args.hub_timeout:g}: give a positive number of seconds", file=sys.stderr)
        return 2
    options = {
        "space": args.space, "revision_tag": args.revision_tag, "license": args.license, "fp16": args.fp16
    }  # fmt: skip
    try:
        if args.dry_run:
            push.show(args.run, args.hub_model_id, **options)
        else:
            push.publish(
                args.run, args.hub_model_id, private=args.hub_private_repo, seconds=args.hub_timeout, **options
            )
    except client.HubError as error:
        advice = "The run is unchanged."
        if error.same_command:
            command = shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])
            advice += f" To publish it later:\n    {command}"
        print(f"publish.py: {error}\n{advice}", file=sys.stderr)
        return 3
    except check.LoadingError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npublish.py: interrupted. The run is unchanged.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # sys.exit would wait for threads, and one may be waiting for the Hub without a limit
