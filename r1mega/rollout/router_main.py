"""python -m r1mega.rollout.router_main FLAGS: the sglang-router, with the key of the environment.

Its own flag for the key would show it in the list of processes.
"""

import sys

from sglang_router.launch_router import launch_router, parse_router_args

from r1mega.rollout.control import api_key


def main() -> None:
    args = parse_router_args(sys.argv[1:])
    args.api_key = api_key()
    launch_router(args)


if __name__ == "__main__":
    main()
