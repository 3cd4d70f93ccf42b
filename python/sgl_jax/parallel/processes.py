"""One jax over several processes: a program runs on the devices of all, and each process feeds and reads its own."""

import jax


def join_processes(coordinator: str, bind: str, number: int, index: int, timeout_s: float) -> None:
    """Make this process one of `number`, so that jax.devices() has the devices of all. Blocks until all have called it.

    Call it before anything looks for devices. `coordinator` is HOST:PORT of process 0, which listens on `bind`.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which means "end" here
    jax.distributed.initialize(
        coordinator, number, index, coordinator_bind_address=bind, initialization_timeout=max(int(timeout_s), 30)
    )
