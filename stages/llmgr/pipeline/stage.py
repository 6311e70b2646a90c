"""What every stage script shares: its command line, its view of params.yaml, and how it fails."""
from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llmgr.runtime.console import WORKERS
from llmgr.runtime.errors import UserError, WorkersFailed, disk_is_full, out_of_memory
from llmgr.runtime.masking import masked
from llmgr.runtime.memory import what_helps
from llmgr.runtime.ownership import alone, follow_dvc, let_go
from llmgr.runtime.plan import Timed
from llmgr.runtime.resume import home


def run(main: Callable[..., None], doc: str, reads: Sequence[str], options: dict[str, str] | None = None, *,
        optional: dict[str, str] | None = None, workers: bool = False) -> None:
    """Parse the command line, load the declared keys of params.yaml, run `main(params, **options)`.

    `doc` is the script's docstring and becomes `--help`; `reads` are the parameter keys that `main` may use
    (`tune`, `data.max_session`), the same ones that dvc.yaml declares; `options` maps further required options to
    their help, `optional` those that are None where they are not given. A key may hold an option in braces:
    `encoder.{encoder}` is the section of the encoder given, whatever follows its hyphen. With `workers` the stage runs
    in as many processes as `launch` says.
    Exit status 2 and one sentence on what the user can mend; a traceback on a defect.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (options or {}).items():
        parser.add_argument(f"--{name}", required=True, help=text)
    for name, text in (optional or {}).items():
        parser.add_argument(f"--{name}", help=text)
    arguments = vars(parser.parse_args())
    follow_dvc()
    try:
        from llmgr.params.loading import load

        filled = {name: value.partition("-")[0] for name, value in arguments.items() if value is not None}
        params = load("params.yaml").view([key.format(**filled) for key in reads])
        alone(home())
        timed = Timed(home())
        timed.announce()
        if workers:
            from llmgr.training.launcher import processes

            with processes(params.launch) as works:
                if works:
                    main(params, **arguments)
        else:
            main(params, **arguments)
        timed.done()
    except UserError as error:
        _fail(str(error))
    except WorkersFailed as failed:
        _fail(str(failed), failed.status)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on from the last checkpoint", status=130)
    except Exception as error:
        if disk_is_full(error):
            reason = " ".join(str(error).splitlines()[0][:160].split())
            _fail(f"the disk is full or a file limit was reached ({reason}); free some space and run `dvc repro` "
                  "again: finished files are whole and training goes on from its last checkpoint")
        if out_of_memory(error):
            _fail(f"out of memory: {what_helps(Path(sys.argv[0]).stem)}")
        _fail(traceback.format_exc(), status=1)
    finally:
        let_go()


def _fail(said: str, status: int = 2) -> None:
    """End with `status`; a worker leaves what it says to the process that started it, which says it once."""
    said = masked(said, paths=False)
    sys.stdout.flush()
    if folder := os.environ.get(WORKERS):
        Path(folder, f"{os.environ['RANK']}.error").write_text(said)
    else:
        print(said if status == 1 else f"error: {said}", file=sys.stderr, flush=True)
    os._exit(status) if status == 130 or "RANK" in os.environ else sys.exit(status)  # others may wait for this one
