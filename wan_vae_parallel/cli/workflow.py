"""``workflow``: Apply put behind every Wan VAE's loader of a ComfyUI workflow."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..devices import DTYPES
from ..errors import ArgumentError, about_file
from ..files.whole import check_writable, replacing
from ..workflows import make_parallel


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    workflow = commands.add_parser(
        "workflow", help="put Apply Wan VAE Parallel behind every Wan VAE's loader of a ComfyUI workflow"
    )
    workflow.add_argument("input", type=Path, metavar="IN.json", help="an editor's workflow, or an API's")
    workflow.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.json", help="the file to write")
    workflow.add_argument("--devices", default="auto", help="what the new nodes get; default: %(default)s")
    workflow.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="likewise; default: %(default)s")
    workflow.add_argument(
        "--vae", action="append", default=[], metavar="NAME", dest="names",
        help="another file that is a Wan VAE, with * for any letters; may be given again",
    )  # fmt: skip
    workflow.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_writable(options.output)
    way = "save the workflow in ComfyUI, or export it for the API"
    try:
        content = options.input.read_bytes()
        workflow = json.loads(content)  # in whichever UTF: PowerShell writes UTF-16
    except OSError as error:
        raise ArgumentError(about_file(options.input, f"can't be opened; {way}", error.strerror or error)) from error
    except UnicodeDecodeError as error:
        raise ArgumentError(about_file(options.input, f"can't be read as JSON; {way}", "it is no text")) from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(about_file(options.input, f"can't be read as JSON; {way}", error)) from error
    changed, outcomes = make_parallel(workflow, devices=options.devices, dtype=options.dtype, names=options.names)
    # As the editor writes it: on one line, or with two spaces.
    indent = 2 if b"\n" in content.strip() else None
    text = json.dumps(changed, ensure_ascii=False, indent=indent)
    with replacing(options.output) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))  # half of an emoji is an escape again
    for one in outcomes:
        where = f" in {one.graph}" if one.graph else ""
        print(f"loader {one.node}{where}, {one.file}: {one.done}")
    count = sum(one.changed for one in outcomes)
    print(f"written: {options.output}, {count} of {len(outcomes)} loaders made parallel")
