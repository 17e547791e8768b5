"""Work in a fork of this process: apart from it, as in a process of its own, but without importing
everything again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> tuple[int, str]:
    """(exit code, what was said on both streams)."""
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                for number in (1, 2):
                    os.dup2(said.fileno(), number)
                sys.stdout = sys.stderr = os.fdopen(
                    1, "w", buffering=1, encoding="utf-8", closefd=False
                )
                work()
                code = 0
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else int(done.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode()
