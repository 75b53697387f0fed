"""Start the server: `mpirun -np N python serving.py --repo-id-or-model-path FOLDER`. Every rank.

Rank 0 schedules, samples and serves HTTP; the others run the batches it sends.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path

from autotp_serving.command_line import parse_args
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.logs import configure_logging
from autotp_serving.ranks import (
    Control,
    Failure,
    GroupFailure,
    LaunchError,
    check_open_files,
    find_launched_rank,
    find_num_ranks,
    is_first_rank,
    join_control,
    leave_group,
)
from autotp_serving.stand_in import StandIn, part_from_launcher

EXIT_CANNOT_START = 2


def main(argv: list[str] | None = None) -> int:
    """Run this rank until the server stops. Returns the exit code: 2 when it could not start."""
    # Ctrl+C before the server runs ends this rank, and so the group: as a KeyboardInterrupt it
    # would leave the rank waiting, in MPI's own exit, for others that never come.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = find_launched_rank(os.environ)
    stand_in = StandIn(None) if rank is None else part_from_launcher(rank)
    try:
        check_open_files(os.environ)
        control = join_control(os.environ)
    except LaunchError as error:
        return report(str(error)) if is_first_rank(os.environ) else EXIT_CANNOT_START
    try:
        return run_rank(control, argv, stand_in)
    except GroupFailure as error:
        return report(str(error)) if control.rank == 0 else EXIT_CANNOT_START
    except LaunchError as error:  # the others cannot hear this rank, so it speaks for itself
        report(str(error))
        control.abort(EXIT_CANNOT_START)
        return EXIT_CANNOT_START
    except Exception:
        # The other ranks may be waiting for this one inside a collective: none may stay behind.
        logging.getLogger("autotp_serving").exception("rank %d failed", control.rank)
        control.abort()
        return 1


def report(message: str) -> int:
    """Say in one line why the server cannot start."""
    print(f"serving.py: error: {message}", file=sys.stderr, flush=True)
    return EXIT_CANNOT_START


def run_rank(control: Control, argv: list[str] | None, stand_in: StandIn) -> int:
    """Parse, load and serve or follow.

    Raises:
        GroupFailure: on every rank, when some rank cannot start.
    """
    try:
        # --help is for one reader, not for one reader per rank.
        silence = contextlib.redirect_stdout(io.StringIO()) if control.rank else None
        with silence or contextlib.nullcontext():
            config = parse_args(argv)
        configure_logging(config.log_level, config.log_format, control.rank)
        num_ranks = find_num_ranks(config, control)
        if config.plan:
            return plan(config, control, num_ranks)
        if config.save_low_bit is not None:
            return save(config, control)
        if control.rank == 0:
            return lead(config, control, stand_in)
        return follow(config, control)
    except (ConfigError, LaunchError) as error:
        control.all_gather(Failure(" ".join(str(error).split())))
        raise


def lead(config: ServingConfig, control: Control, stand_in: StandIn) -> int:
    """Rank 0: load, then answer requests until told to stop."""
    from autotp_serving.api.app import build_app
    from autotp_serving.api.keys import load_api_keys
    from autotp_serving.api.server import check_tls, reserve_port, serve
    from autotp_serving.api.streams import AsyncEngine
    from autotp_serving.engine import Engine
    from autotp_serving.engine.sandbox import Sandbox
    from autotp_serving.tokenizer import HuggingFaceTokenizer
    from autotp_serving.worker import start_worker

    api_keys = load_api_keys(config, os.environ)
    check_tls(config)
    sock = reserve_port(config.host, config.port)
    worker = start_worker(config, control)
    tokenizer = HuggingFaceTokenizer(
        Path(config.model_path),
        trust_remote_code=config.trust_remote_code,
        num_rows=worker.vocab_size,
    )
    sandbox = Sandbox(tokenizer)
    sandbox.start()
    engine = AsyncEngine(
        lambda deliver: Engine(
            worker.lead,
            tokenizer,
            config,
            worker.max_model_len,
            deliver,
            find_late_ranks=worker.lead.find_late_ranks,
        ),
        config.request_timeout,
    )
    spare_collector()
    control.all_gather("ready")
    worker.channel.watch(engine.engine.fail, config.step_timeout)
    stand_in.on_end = partial(engine.engine.fail, "the launcher has ended this server")
    engine.engine.start()
    app = build_app(engine, tokenizer, config, worker.max_model_len, api_keys, sandbox)
    exit_code = serve(app, engine, config, sock)
    ignore_signals()  # uvicorn has let go of them, and the end is near
    if exit_code or not engine.engine.shutdown():
        control.abort()
    worker.lead.stop()
    return exit_code


def plan(config: ServingConfig, control: Control, num_ranks: int) -> int:
    """Rank 0: print what the model will take on each rank. The others have nothing to do."""
    if control.rank == 0:
        from autotp_serving.model.planner import print_plan

        # Without a launcher to say otherwise, all ranks are on one host.
        local_size = control.local_size if control.size > 1 else num_ranks
        print_plan(config, num_ranks, local_size)
    control.all_gather("planned")
    return 0


def save(config: ServingConfig, control: Control) -> int:
    """All ranks: convert the checkpoint into a folder that loads quickly, and leave."""
    from autotp_serving.model.loader import read_model_config
    from autotp_serving.model.save import save_low_bit

    save_low_bit(config, read_model_config(config), control)
    return 0


def follow(config: ServingConfig, control: Control) -> int:
    """Other ranks: load, then obey rank 0, which alone decides when to stop."""
    from autotp_serving.worker import start_worker

    worker = start_worker(config, control)
    ignore_signals()
    spare_collector()
    control.all_gather("ready")
    worker.channel.watch(partial(leave_group, control.rank), config.step_timeout)
    worker.runner.follow(worker.channel)
    return 0


def spare_collector() -> None:
    """Keep the garbage collector off what has been loaded, all of which stays.

    To look through it takes a fifth of a second, in which every stream stands still.
    """
    gc.collect()
    gc.freeze()


def ignore_signals() -> None:
    """Leave it to rank 0 to end this rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
