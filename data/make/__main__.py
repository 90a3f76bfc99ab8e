"""`python -m data.make [tasks] [decoder] [encoder]` makes the named parts of data/ again (all three if none is named).

Run it from the repository's root. One thread is fastest when both pretrainings run side by side. It exits with 1, and
says why, if a pretrained model fails its gate.
"""

import argparse
import os
import sys

PARTS = ("tasks", "decoder", "encoder")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m data.make", description="Makes tasks and models of data/ again.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of: {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args(arguments).parts or PARTS
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    failed = []
    if "tasks" in chosen:
        from . import tasks

        tasks.main()
    if "decoder" in chosen or "encoder" in chosen:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "decoder" in chosen:
        from . import decoder

        failed += decoder.main()
    if "encoder" in chosen:
        from . import encoder

        failed += encoder.main()
    for sentence in failed:
        print(f"gate failed: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
