"""`tahoefs run DIR`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tahoefs.registry import node_registered

if TYPE_CHECKING:
    from grid.server_directory import ServerDirectory


@click.command("run", short_help="run a node's services")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Statistics for Prometheus, on 127.0.0.1.")
@click.pass_context
def command(ctx: click.Context, directory: Path, metrics_port: int | None) -> None:
    """Run the services that the node directory DIRECTORY enables, until told to stop.

    These are an introducer, storage, an upload helper, or a statistics gatherer.

    Says `ready` in one line when they answer. SIGTERM and SIGINT let it finish what it was asked for first; a second
    one does not. The log goes to standard error.
    """
    import trio

    from grid.server_directory import ServerDirectory
    from tahoefs.limits import allow_open_files
    from tahoefs.logs import set_up_logging

    set_up_logging(None, debug=ctx.obj["debug"])
    allow_open_files()
    node = ServerDirectory.open(directory)
    with node_registered(node.path) as socket:
        trio.run(_run, node, socket, metrics_port)


async def _run(node: ServerDirectory, socket: Path, metrics_port: int | None) -> None:
    import trio

    from grid.services import Serving, serve_node
    from tahoefs import sdnotify
    from tahoefs.control import serve_control
    from tahoefs.exposition import stats_command
    from tahoefs.metrics_endpoint import serve_metrics
    from tahoefs.signals import stop_on_signals

    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        await nursery.start(stop_on_signals, stop, nursery.cancel_scope)

        async def serve(*, task_status: trio.TaskStatus[Serving]) -> None:
            await serve_node(node, stop, task_status=task_status)
            nursery.cancel_scope.cancel()

        serving = await nursery.start(serve)
        await nursery.start(serve_control, socket, {"stats": stats_command(serving.registry, str(node.path))})
        if metrics_port is not None:
            await nursery.start(serve_metrics, metrics_port, serving.registry)
        ports = ",".join(map(str, serving.ports))
        click.echo(f"ready services={','.join(serving.services)} port={ports} furl_file={node.furl_file}")
        sdnotify.ready()
        await stop.wait()
        sdnotify.stopping()
