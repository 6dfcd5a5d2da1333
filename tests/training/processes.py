"""Workers without Ray, one process each."""

import multiprocessing
import os
import tempfile


def start(worker, size: int, *arguments) -> None:
    """Run `worker(rank, size, meeting_point, *arguments)` in `size` processes, to their end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hrm_ray.training.launch"])  # torch is imported once for all of them
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = os.path.join(folder, "rendezvous")  # noqa: PTH118
        processes = [
            context.Process(target=worker, args=(r, size, meeting_point, *arguments)) for r in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
