"""What a cluster has and can have, and whether a training or a sweep fits on it."""

from collections.abc import Iterator, Sequence

from hrm_ray.nodes import Growth, Resources, amounts, fit, free, growth, living, most
from hrm_ray.ray_session import cluster_address, ray_session

Row = tuple[str, str]


def cluster_rows(needs: "Needs | None" = None) -> Iterator[Row]:
    """Rows of a table, each when it is known. The cluster is that of RAY_ADDRESS, else a private Ray on this machine.

    Args:
        needs: what is to fit, if anything.

    Raises:
        UserError: there is no such cluster, or it can never fit.
    """
    with ray_session():
        grows = growth()
        yield "cluster", cluster_address() or "this machine"
        nodes = living()
        yield "nodes", f"{len(nodes)} ({_total(nodes)}), free: {_total(free())}"
        if grows is None:
            yield "can grow by", "not known: its autoscaler's configuration is not on the head"
        else:
            yield "can grow by", grows.describe() or "nothing"
        if needs is not None:
            yield from needs.rows(grows)


def _total(nodes: Sequence[Resources]) -> str:
    return amounts({name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")})


class _Training:
    def __init__(self, words: Sequence[str]):
        from hrm_ray.config.compose import train_config

        self._config = train_config(words, by_hand=True)

    def rows(self, grows: Growth | None) -> Iterator[Row]:
        from hrm_ray.training.ray_train import resources_of

        if self._config.scaling.mode == "local":
            yield "training takes", "this process alone (scaling=local)"
            return
        scaling = self._config.scaling
        cpus, use_gpu = resources_of(self._config, grows)
        bundle = {"CPU": cpus, "GPU": int(use_gpu)}
        workers = (
            f"{scaling.min_workers} to {scaling.max_workers}" if scaling.is_elastic else scaling.max_workers
        )
        yield "training takes", f"{workers} x ({amounts(bundle)})"
        yield "fits", _room(bundle, scaling.min_workers, "workers", grows)


class _Sweep:
    def __init__(self, words: Sequence[str]):
        from hrm_ray.tuning.config import load_sweep

        self._config = load_sweep(words[0], words[1:])

    def rows(self, grows: Growth | None) -> Iterator[Row]:
        from hrm_ray.tuning.execute import check_fits
        from hrm_ray.tuning.outline import slot_of

        slot = slot_of(self._config, grows)
        yield "a trial takes", slot.describe()
        check_fits(slot, grows)
        yield "fits", _room(slot.bundle, slot.num_workers, "trials", grows, slot.num_workers)


Needs = _Training | _Sweep


def needs_of(words: Sequence[str]) -> Needs | None:
    """What a training or a sweep takes; None without words.

    Args:
        words: of ``hrm-ray train``, or of ``hrm-ray tune``: then the first is the sweep's name or file.

    Raises:
        UserError: one of them is wrong.
    """
    if not words:
        return None
    return _Training(words) if "=" in words[0] else _Sweep(words)


def _room(bundle: Resources, least: int, what: str, grows: Growth | None, of: int = 1) -> str:
    """For how many, each of `of` bundles, there is room, and whether that is enough for `least` bundles."""
    now, there = fit(free(), bundle), fit(living(), bundle)
    counts = f"{now // of} {what} now"
    if there > now:
        counts += f", {there // of} when nobody else is there"
    if grows is None:
        return f"{counts}, perhaps more when it has grown"
    if grows.types:
        counts += f", {most(bundle, grows) // of} when it has grown"
    return f"{counts}{'' if now >= least else ': it will wait for room'}"
