"""A model whose indexers know nothing: `python examples/rebuild_indexer/blank.py OUT [-m MODEL] [--seed N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from keyecli.model.checkpoint import load_model, resolve_model, save_model
from keyecli.model.companions import copy_companions
from keyecli.training.indexer import reinitialise_indexer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("-m", "--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = resolve_model(arguments.model)
    model = load_model(source)
    reinitialise_indexer(model, arguments.seed)
    arguments.out.mkdir(parents=True)
    copy_companions(source, arguments.out)
    # fp32: 16 bits would round the small steps of the training that follows.
    save_model(model, arguments.out)
    print(f"{arguments.out}: new indexers in {len(model.model.layers)} layers")


if __name__ == "__main__":
    main()
