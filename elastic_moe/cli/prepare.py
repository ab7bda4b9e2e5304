"""Make the token shards of a corpus before a run: `elastic-moe prepare data.corpus=PATH ...`.

Takes the keys of `elastic-moe train`, and makes what `train` with the same keys would make first, in the same place
(`data.cache_dir`, or `.cache` beside `run.dir`), so that a run begins at once. Neither Ray nor torch is needed. Killed
and started again, it goes on where it was.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from elastic_moe.errors import UserError

INTERRUPTED = 130  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for bad input, 130 after Ctrl-C."""
    from elastic_moe.cli.compose import check, register_schema
    from elastic_moe.cli.key_help import show_help

    register_schema()
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        show_help("prepare", "Make the token shards of a corpus before a run, as `train` with the same keys would.")
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (config,) = check(overrides)
        from elastic_moe.actors.corpus_progress import CorpusProgress
        from elastic_moe.data.prepare import default_cache_root, prepare
        from elastic_moe.run_log import RunLog

        log = RunLog(config.run.log_format, "prepare")
        with CorpusProgress(config.run.log_every_s, log) as shown:
            prepared = prepare(config.data, default_cache_root(config.data, Path(config.run.dir).expanduser()), shown)
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("elastic_moe: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    log.tell(prepared.summary, event="corpus")
    log.tell(f"the tokens are in {Path(prepared.train_path).parent}", event="tokens", digest=prepared.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
