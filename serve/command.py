"""`slicer serve`: options in, a running server or one line of error out."""

from __future__ import annotations

import os
import signal
from ipaddress import ip_address

import click


@click.command()
@click.argument("source")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--api-key", help="What clients must send  [default: the environment's VLLM_API_KEY]")
@click.option("--no-auth", is_flag=True, help="Allow a server without a key beyond this machine.")
@click.option("--name", help="Name under which clients ask for the model  [default: SOURCE's]")
@click.option(
    "--draft", metavar="SLICED", help="A cut of SOURCE that drafts tokens for it (speculative decoding)."
)
@click.option("--num-speculative-tokens", type=click.IntRange(min=1), default=3, show_default=True,
              help="Tokens drafted at a time.")  # fmt: skip
@click.option("--timeout", type=click.IntRange(min=1), default=1800, show_default=True,
              help="Seconds until the server must be ready.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def serve(
    source: str,
    vllm_flags: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    no_auth: bool,
    name: str | None,
    draft: str | None,
    num_speculative_tokens: int,
    timeout: int,
    debug: bool,
) -> None:
    """Serve SOURCE with vLLM behind an OpenAI-compatible endpoint.

    SOURCE is a directory, a Hub id or "demo". Flags of vLLM's own go after --:

    \b
    slicer serve qwen-20L -- --max-model-len 4096 --tensor-parallel-size 2
    """
    from slicer import console
    from slicer.errors import UsageError
    from slicer.serve.server import Server

    api_key = api_key or os.environ.get("VLLM_API_KEY") or None
    if not _is_loopback(host) and not api_key and not no_auth:
        raise UsageError(
            f"--host {host}: anyone who reaches this address could use the model; give --api-key, or say --no-auth"
        )
    if not _is_loopback(host) and not api_key:
        click.echo(f"note: no key is asked for on {host}", err=True)
    # A shell script's background jobs are started deaf to SIGINT; a server must hear it all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with console.progress() as progress:
        server = Server(
            source,
            host=host,
            port=port,
            api_key=api_key,
            name=name,
            draft=draft,
            speculative_tokens=num_speculative_tokens,
            arguments=vllm_flags,
            timeout=timeout,
            progress=progress.stage,
        )
        console.print_serving(server.settings.path, server.model, server.notes)
        try:
            with server:
                progress.close()
                console.print_ready(server.base_url, server.model, bool(api_key))
                server.wait()
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
