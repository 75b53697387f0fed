"""What of HTTP can be refused before anything is loaded: port, certificate. Rank 0 only.

Standard library only, so that ranks need not wait for the packages that serve.
"""

from __future__ import annotations

import errno
import socket
import ssl

from autotp_serving.config import ConfigError, ServingConfig


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind early, so that a port in use is known before minutes go into loading a model.

    Raises:
        ConfigError: naming the address and the cure.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error}") from error
    family, kind, protocol, _, address = infos[0]
    sock = socket.socket(family, kind, protocol)
    try:
        try:
            # Without SO_REUSEADDR: two servers that both load may not share the port.
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # With it the remains of a server just stopped (TIME_WAIT) are no obstacle.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is taken: stop what listens on it, or choose another with --port"
            ) from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return sock


def check_tls(config: ServingConfig) -> None:
    """Read certificate and key early, for the same reason.

    Raises:
        ConfigError: naming the flag.
    """
    for flag, path in (
        ("--ssl-certfile", config.ssl_certfile),
        ("--ssl-keyfile", config.ssl_keyfile),
    ):
        try:
            if path is not None:
                open(path, "rb").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from error
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password is empty, or the terminal would be asked for one.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} are no "
            f"certificate with its key, both in PEM and without a password: {error}"
        ) from error
