"""Write the report of a run anew: `python -m fastvlm_loss.trainer.report runs/tiny-shapes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..evaluation import Evaluation
from . import newest_meta, write


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the newest checkpoint, if there is one, and write the report; status 1 where nothing can be shown."""
    parser = argparse.ArgumentParser("python -m fastvlm_loss.trainer.report", description="Write a run's report anew.")
    parser.add_argument("folder", type=Path, help="the output folder of the run")
    parser.add_argument("--log-only", action="store_true", help="curves alone; do not evaluate the checkpoint")
    asked = parser.parse_args(arguments)
    evaluation = None
    meta = {} if asked.log_only else newest_meta(asked.folder)
    try:
        if meta:
            evaluation = _evaluated(asked.folder, meta)
    except (ValueError, OSError) as error:
        print(f"report: without examples, because the checkpoint cannot be evaluated: {error}", file=sys.stderr)
    try:
        print(write(asked.folder, evaluation))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluated(folder: Path, meta: Mapping[str, Any]) -> Evaluation:
    from ..run import Run
    from ..world import joined

    config = replace(config_of(meta["config"]), output=str(folder), resume="auto")
    with joined(config.device) as world:
        return Run(config, world).evaluate()


def config_of(given: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint remembers as JSON."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, "run")
    found: Any = parser.parse_object({"run": dict(given)})
    found = parser.instantiate(found) if hasattr(parser, "instantiate") else parser.instantiate_classes(found)
    config: Config = found.run
    return config


if __name__ == "__main__":
    sys.exit(main())
