"""python -m utils.memory plan --model llama-3-8b --gpu T4: which methods fit, with which batch."""

import argparse
import sys

from utils.memory.plan import GOALS, plan


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan", help="which methods fit a GPU, with which batch")
    planning.add_argument("--model", required=True, help="llama-2-7b and the like, a folder, a hub name")
    planning.add_argument("--gpu", required=True, help="a name such as T4, L4, RTX-4090, A100-80GB")
    planning.add_argument("--length", type=int, default=1024, help="tokens per row (default: 1024)")
    planning.add_argument("--goal", choices=GOALS, default="quality", help="what to list first (default: quality)")
    asked = parser.parse_args(arguments)
    try:
        print(plan(asked.model, asked.gpu, length=asked.length, goal=asked.goal))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
