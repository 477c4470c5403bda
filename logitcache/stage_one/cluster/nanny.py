"""The process that starts a worker and watches it."""

from distributed import Nanny, Status


class StartingNanny(Nanny):  # type: ignore[misc]
    """A nanny that starts a worker once: if that is killed before it runs, the nanny closes.

    Before Dask 2026.8 a nanny starts such a worker again while it still waits for the first: each then takes the
    other's messages, and both wait forever.
    """

    async def _on_worker_exit(self, exitcode: int) -> None:
        if self.status not in (Status.init, Status.starting):
            await super()._on_worker_exit(exitcode)
