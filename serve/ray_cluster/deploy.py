"""Put replicas onto a Ray cluster, and take them away again."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from ...errors import InputError, StepError
from ..settings import ServeSettings
from .ray_backend import RayBackend
from .replica import Replica

LOCAL = "local"
_DEPLOYMENT = "Replica"
_MORE_THAN_THE_QUEUE = 64  # replicas refuse with 429 themselves: Ray must not queue before them
_IMAGES_IN_A_CALL = 8  # where --max-batch leaves it to the replica to measure
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def deploy(settings: ServeSettings, say: Callable[[str], None]) -> RayBackend:
    """Connect, start the replicas and wait until the first are ready.

    Raises `InputError` where Ray is missing or the address does not answer, `StepError` where no
    replica starts.
    """
    ray, serve = _ray_modules()
    address = settings.cluster.ray_address or LOCAL
    _connect(ray, address)
    where = "a Ray cluster here" if address == LOCAL else f"the Ray cluster at {address}"
    say(f"starting {_replica_words(settings)} on {where}")
    gpus = _gpus(ray, settings)
    name = f"qdit-{secrets.token_hex(4)}"  # several servers may share a cluster
    try:
        serve.start(proxy_location="Disabled")  # HTTP is this process's
        handle = serve.run(_application(serve, settings, gpus), name=name, route_prefix=None)
        about = handle.about.remote().result(timeout_s=settings.limits.request_timeout)
    except Exception as error:  # Ray and Serve raise many kinds
        ray.shutdown()
        raise StepError(
            f"no replica started: {str(error).strip().splitlines()[-1]}; see `ray status`, and "
            f"whether every node can read {settings.folder}"
        ) from error

    def running() -> int:
        deployments = serve.status().applications[name].deployments
        states: dict[str, int] = deployments[_DEPLOYMENT].replica_states
        return int(states.get("RUNNING", 0))

    def shut_down() -> None:
        serve.delete(name)
        ray.shutdown()

    return RayBackend(name, handle, about.cards, running, shut_down)


def _application(serve: Any, settings: ServeSettings, gpus: float) -> Any:
    cluster, limits = settings.cluster, settings.limits
    least, most = cluster.replica_range
    cpus = cluster.replica_cpus or 1.0
    if gpus == 0 and settings.threads is None:
        settings = settings.model_copy(update={"threads": max(1, int(cpus))})
    scale: dict[str, Any] = {"num_replicas": least}
    if most > least:
        wanted = (limits.max_batch or 2 * _IMAGES_IN_A_CALL) / 2
        scale = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": wanted,
            }
        }
    deployment = serve.deployment(
        Replica,
        name=_DEPLOYMENT,
        max_ongoing_requests=limits.max_queue + _MORE_THAN_THE_QUEUE,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        max_constructor_retry_count=2,
        **scale,
    )
    return deployment.bind(settings)


def _gpus(ray: Any, settings: ServeSettings) -> float:
    """GPUs of one replica: as told, else one where the device is a GPU or the cluster has some."""
    if settings.cluster.replica_gpus is not None:
        return settings.cluster.replica_gpus
    if settings.device == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return 0.0 if settings.device == "cpu" else 1.0


def _replica_words(settings: ServeSettings) -> str:
    least, most = settings.cluster.replica_range
    if most > least:
        return f"{least} to {most} replicas"
    return "1 replica" if least == 1 else f"{least} replicas"


def _connect(ray: Any, address: str) -> None:
    options = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, **options, **_QUIET)
    except Exception as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error}; --ray-address takes local, auto or "
            "HOST:PORT"
        ) from error


def _ray_modules() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise InputError(
            f"--ray needs {error.name}; install it with `pip install 'qdit[serve,ray-serve]'`"
        ) from error
    return ray, serve
