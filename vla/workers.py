"""Worker processes that share one import of the heavy libraries.

A fork server imports them once, while this process does the same; each worker is then a fork of it. The server holds no
threads, no simulator and no GPU when it forks.
"""

from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext

PRELOAD = ["vla.policies.loading", "vla.eval.rollouts"]


def worker_context() -> ForkServerContext:
    """The context for pools of workers; called early, it starts importing in the background."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context
