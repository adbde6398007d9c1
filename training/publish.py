"""Publish a run on the Hub: `python training/publish.py runs/moons --hub_model_id user/name`.

Exit codes: 0 published; 1 the folder does not load in the three ways, nothing was sent; 2 a mistake in the command or
the run; 3 the Hub failed, the run is as it was, and the command that publishes it later is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the project, so that `ddpm_pipeline` is found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Publish a run on the Hugging Face Hub.", allow_abbrev=False)
    made.add_argument("run", help="folder of a run that has ended")
    made.add_argument("--hub_model_id", required=True, help='"user/name"; made if it is missing')
    made.add_argument("--hub_private_repo", action="store_true", help="make it private")
    made.add_argument("--revision_tag", help="tag of the commit, such as v1; by default made of what the files hold")
    made.add_argument("--license", help="of the weights, as the Hub calls it: mit, cc-by-4.0, ...; by default unknown")
    made.add_argument("--fp16", action="store_true", help='weights in half precision too, for variant="fp16"')
    made.add_argument("--hub_timeout", type=float, default=600, help="seconds that the Hub may take for everything")
    made.add_argument("--dry_run", action="store_true", help="show the files and the card; nothing is sent")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if not given.hub_timeout > 0:
        print(f"publish.py: hub_timeout is {given.hub_timeout:g}: give seconds, more than 0", file=sys.stderr)
        return 2
    from training.hub import check, client, push

    options = {"revision_tag": given.revision_tag, "license": given.license, "fp16": given.fp16}
    try:
        if given.dry_run:
            show(given.run, given.hub_model_id, options)
        else:
            push.publish(
                given.run, given.hub_model_id, private=given.hub_private_repo, seconds=given.hub_timeout, **options
            )
    except client.HubError as error:
        print(f"publish.py: {error}\nThe run is as it was. To publish it later:\n    {later()}", file=sys.stderr)
        return 3
    except check.LoadingError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    return 0


def show(run: str, repo_id: str, options: dict[str, object]) -> None:
    """What would be published: the files with their sizes, and the card."""
    from training.hub import check, stage

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tag = stage.stage(run, folder, repo_id=repo_id, **options)  # type: ignore[arg-type]
        names = stage.files_of(folder)
        sizes = [(folder / name).stat().st_size for name in names]
        print("\n".join(f"{size:>13,}  {name}" for size, name in zip(sizes, names)))
        print(f"{sum(sizes):>13,}  bytes in {len(names)} files, for {repo_id} with the tag {tag}\n")
        print("It loads in three ways: " + check.told(check.check_loading(folder)) + "\n")
        print((folder / stage.CARD).read_text(encoding="utf-8"))


def later() -> str:
    """This command, to be given again."""
    return shlex.join(["python", *sys.argv])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: that waits for threads, and one may wait for the Hub for ever
