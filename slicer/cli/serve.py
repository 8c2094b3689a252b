"""The command `slicer serve`."""

from __future__ import annotations

import os
import signal
from ipaddress import ip_address
from typing import Any

import click

from slicer.cli import groups
from slicer.cli.groups import group, option


@groups.command()
@click.argument("source")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
@group(
    "Endpoint",
    option("--host", default="127.0.0.1", help="Address to listen on."),
    option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0: a free one."),
    option("--api-key", show_default="VLLM_API_KEY of the environment", help="Key that clients must send."),
    option("--no-auth", default=False, help="Allow access from other machines without a key."),
    option("--name", show_default="SOURCE's", help="Model name for clients."),
    option("--timeout", type=groups.POSITIVE, metavar="SECONDS", default=1800, help="Maximum startup time."),
)  # fmt: skip
@group(
    "Speculative decoding",
    option("--draft", metavar="SLICED", help="A cut of SOURCE as its draft model."),
    groups.DRAFTED,
)  # fmt: skip
def serve(source: str, vllm_flags: tuple[str, ...], **given: Any) -> None:
    """Serve SOURCE with vLLM, with an OpenAI-compatible endpoint.

    SOURCE is a directory, a Hub id or "demo". Pass vLLM's own flags after --:

    \b
    slicer serve qwen-20L --port 8000
    slicer serve qwen-20L -- --max-model-len 4096 --tensor-parallel-size 2
    """
    from slicer.cli.render import progress, written
    from slicer.errors import UsageError
    from slicer.serve.server import Server

    host, api_key = given["host"], given["api_key"] or os.environ.get("VLLM_API_KEY") or None
    if not _is_loopback(host) and not api_key:
        if not given["no_auth"]:
            raise UsageError(
                f"--host {host}: anyone who can reach this address could use the model; pass --api-key or --no-auth"
            )
        click.echo(f"note: {host} needs no key", err=True)
    # A shell starts background jobs with SIGINT ignored; the server must handle it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with progress.bars() as bars:
        names = ("host", "port", "name", "draft", "speculative_tokens", "timeout")
        settings = {name: given[name] for name in names}
        server = Server(source, api_key=api_key, arguments=vllm_flags, progress=bars.stage, **settings)
        written.print_serving(server.settings.path, server.model, server.notes)
        try:
            with server:
                bars.close()
                written.print_ready(server.base_url, server.model, bool(api_key))
                server.wait()
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
