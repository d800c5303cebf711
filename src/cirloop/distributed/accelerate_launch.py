"""`accelerate launch` without a traceback where a process ended with a message to the user, which
the driver shows."""

from __future__ import annotations

import sys

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cirloop.distributed.process import USER_ERROR


def main() -> None:
    try:
        launch.main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR:
            raise
        sys.exit(1)


if __name__ == "__main__":
    main()
