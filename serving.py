"""Start the server: `python serving.py --tensor-parallel-size N --repo-id-or-model-path FOLDER`.

So this process is the head: it serves HTTP, schedules, and starts N ranks, or several groups of N
(--data-parallel-size), each this program again, which run the batches it sends. Under `mpirun` or
`torchrun` the process is one of the ranks, and rank 0 is what the head would be as well. Head and
every rank.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from autotp_serving.api.api_keys import ApiKeys
    from autotp_serving.api.engine_client import EngineClient, OutputSink
    from autotp_serving.api.traces import Traces
    from autotp_serving.batch import Runner
    from autotp_serving.engine.tokenizer_files import LoadedTokenizer
    from autotp_serving.worker.runner import LeadRunner
    from autotp_serving.worker.worker import Worker

EXIT_CANNOT_START = 2


def report(message: str) -> int:
    """Say in one line why the server cannot start."""
    print(f"serving.py: error: {message}", file=sys.stderr, flush=True)
    return EXIT_CANNOT_START


def report_missing(error: ModuleNotFoundError) -> int:
    """Say which package this Python lacks: most often it is not the environment's."""
    return report(
        f"{sys.executable} has no package {error.name}: 'source .venv/bin/activate' (or that of "
        "your own environment), or 'pip install -r requirements.txt'"
    )


try:
    from autotp_serving.collector import without_collector
    from autotp_serving.command_line import parse_args
    from autotp_serving.config import ConfigError, ServingConfig
    from autotp_serving.distributed.launch import (
        Failure,
        GroupFailure,
        LaunchError,
        LocalRankGroup,
        RankGroup,
        check_open_files,
        find_launched_rank,
        find_num_ranks,
        is_first_rank,
        is_launched,
        join_group,
        leave_group,
    )
    from autotp_serving.distributed.stand_in import StandIn, part_from_launcher
    from autotp_serving.head.rank_side import HeadLine, find_head
    from autotp_serving.logs import configure_logging
    from autotp_serving.model.source import resolve_model
    from autotp_serving.progress import tell_silence
except ModuleNotFoundError as error:
    if os.environ.get("PMI_RANK", os.environ.get("RANK", "0")) == "0":
        report_missing(error)
    sys.exit(EXIT_CANNOT_START)


HEAD_FIELDS = ("max_restarts", "recovery_timeout", "data_parallel_size")
NEEDS_HEAD = (
    "--max-restarts, --recovery-timeout and --data-parallel-size are for a server that starts its "
    "ranks itself: give --tensor-parallel-size and no launcher before it, or leave them out"
)
DOES_NOT_HEAL = (
    "This server ends when a rank dies; started with --tensor-parallel-size and without a launcher "
    "before it, it would start its ranks anew"
)


def main(argv: list[str] | None = None) -> int:
    """Run this rank until the server stops. Returns the exit code: 2 when it could not start."""
    # Ctrl+C before the server runs ends this rank, and so the group: as a KeyboardInterrupt it
    # would leave the rank waiting, in MPI's own exit, for others that never come.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = find_launched_rank(os.environ)
    stand_in = StandIn(None) if rank is None else part_from_launcher(rank)
    head = None
    try:
        check_open_files(os.environ)
        head = find_head(os.environ, rank or 0)
        group = join_group(os.environ)
    except LaunchError as error:
        tell = head.refuse if head else report
        if head or is_first_rank(os.environ):
            tell(str(error))
        return EXIT_CANNOT_START
    except ModuleNotFoundError as error:
        return report_missing(error) if is_first_rank(os.environ) else EXIT_CANNOT_START
    tell = head.refuse if head else report
    try:
        return run_rank(group, argv, stand_in, head)
    except GroupFailure as error:
        if group.rank == 0:
            tell(str(error))
        exit_code = EXIT_CANNOT_START
        if has_stuck_threads():  # of a download, for which Python would wait
            group.abort(exit_code)
        return exit_code
    except LaunchError as error:  # the others cannot hear this rank, so it speaks for itself
        tell(str(error))
        group.abort(EXIT_CANNOT_START)
        return EXIT_CANNOT_START
    except ModuleNotFoundError as error:
        report_missing(error)
        group.abort(EXIT_CANNOT_START)
        return EXIT_CANNOT_START
    except Exception:
        # The other ranks may be waiting for this one inside a collective: none may stay behind.
        logging.getLogger("autotp_serving").exception("rank %d failed", group.rank)
        group.abort()
        return 1


def has_stuck_threads() -> bool:
    """Whether threads run that keep this process from ending."""
    others = set(threading.enumerate()) - {threading.main_thread()}
    return any(not thread.daemon for thread in others)


def run_rank(
    group: RankGroup, argv: list[str] | None, stand_in: StandIn, head: HeadLine | None
) -> int:
    """Parse, load and serve or follow; or be the head.

    Raises:
        GroupFailure: on every rank, when some rank cannot start.
    """
    try:
        if head is not None:
            log = head.config.log_level, head.config.log_format
            configure_logging(*log, group.rank, head.group_name)
            return obey(head, group) if group.rank == 0 else follow(head.config, group, head)
        # --help is for one reader, not for one reader per rank.
        silence = contextlib.redirect_stdout(io.StringIO()) if group.rank else None
        with silence or contextlib.nullcontext():
            config = parse_args(argv)
        configure_logging(config.log_level, config.log_format, group.rank)
        works_alone = config.plan or config.save_low_bit is not None
        if not (works_alone or is_launched(os.environ)) and (
            config.tensor_parallel_size or config.data_parallel_size > 1
        ):
            return run_head(config, config.tensor_parallel_size or 1)
        if not works_alone and any(
            getattr(config, name) != getattr(ServingConfig, name) for name in HEAD_FIELDS
        ):
            raise ConfigError(NEEDS_HEAD)
        num_ranks = find_num_ranks(config, group)
        config = resolve_model(config, group)
        if config.plan:
            return plan(config, group, num_ranks)
        if config.save_low_bit is not None:
            return save(config, group)
        if group.rank == 0:
            return lead(config, group, stand_in)
        return follow(config, group)
    except (ConfigError, LaunchError) as error:
        group.all_gather(Failure(" ".join(str(error).split())))
        raise


def lead(config: ServingConfig, group: RankGroup, stand_in: StandIn) -> int:
    """Rank 0: load, then answer requests until told to stop."""
    with tell_start(group):
        with without_collector():
            from autotp_serving.api.server import serve

        app, engine, runner, sock = load(config, group, stand_in)
    exit_code = serve(app, engine, config, sock)
    ignore_signals()  # uvicorn has let go of them, and the end is near
    if exit_code or not engine.engine.shutdown():
        group.abort()
    runner.stop()
    return exit_code


@contextlib.contextmanager
def tell_start(group: RankGroup) -> Iterator[None]:
    """On rank 0, while it loads: the console is never silent for long."""
    with tell_silence():
        logging.getLogger("autotp_serving").info("Starting %d rank(s), importing torch", group.size)
        yield


def import_worker() -> Callable[..., Worker]:
    """`start_worker`, and torch with it."""
    with without_collector():
        from autotp_serving.worker.worker import start_worker
    return start_worker


def load(
    config: ServingConfig, group: RankGroup, stand_in: StandIn
) -> tuple[FastAPI, EngineClient, LeadRunner, socket.socket]:
    """Rank 0: the application around a running engine, and the port that it will listen at."""
    from autotp_serving.api.port import reserve_port

    api_keys, traces = check_before_loading(config)
    sock = reserve_port(config.host, config.port)
    worker = import_worker()(config, group)
    runner = worker.lead
    assert runner is not None, "only rank 0 leads"
    app, engine = build_server(
        config, [runner], worker.max_model_len, worker.vocab_size, api_keys, traces,
        find_late_ranks=runner.find_late_ranks,
    )  # fmt: skip
    spare_collector()
    group.all_gather("ready")
    logging.getLogger("autotp_serving").info(DOES_NOT_HEAL)
    (fail,) = (one.fail for one in engine.engines)
    worker.channel.monitor(fail, config.step_timeout)
    stand_in.on_end = partial(fail, "the launcher has ended this server")
    engine.engine.start()
    try:
        load_adapters(config, engine)
    except ConfigError as error:  # the other ranks obey already, and can only be told to stop
        engine.engine.shutdown()
        runner.stop()
        sys.exit(report(str(error)))
    return app, engine, runner, sock


def run_head(config: ServingConfig, num_ranks: int) -> int:
    """The head: start the ranks, then answer requests until told to stop, whatever ranks do."""
    if sys.platform != "linux":
        raise ConfigError("ranks are started by the server itself on Linux only: leave "
                          "--tensor-parallel-size out, and start with mpirun")  # fmt: skip
    from autotp_serving.api.port import reserve_port
    from autotp_serving.devices.base import has_card_files, is_host_name
    from autotp_serving.distributed.placement import read_topology
    from autotp_serving.head.places import find_places
    from autotp_serving.head.ranks import RanksLost, RanksRefused, find_launcher
    from autotp_serving.head.runner import RemoteRunner
    from autotp_serving.head.supervisor import Supervisor, start_groups

    num_groups = config.data_parallel_size
    # Groups that share the host's memory take what is left of it one after another.
    in_turn = is_host_name(config.device) or (config.device == "auto" and not has_card_files())
    kind = "cpu" if in_turn else config.device
    topology = read_topology(os.sched_getaffinity(0))
    places = find_places(num_groups, num_ranks, kind, os.environ, topology)
    config = resolve_model(config, LocalRankGroup())
    api_keys, traces = check_before_loading(config)
    sock = reserve_port(config.host, config.port)
    logging.getLogger("autotp_serving").info("Starting %d rank(s)", num_groups * num_ranks)
    pool = ThreadPoolExecutor(1)
    loading = pool.submit(load_ahead, config)
    pool.shutdown(wait=False)
    launcher = find_launcher(num_ranks)
    supervisors = [
        Supervisor(
            launcher, part_folders(config, place.name), num_ranks, RemoteRunner(), place,
            num_groups - number if in_turn else num_groups,
        )
        for number, place in enumerate(places)
    ]  # fmt: skip
    try:
        ready = start_groups(supervisors, in_turn=in_turn)
        app, engine = build_server(
            config, [one.runner for one in supervisors], ready.max_model_len, ready.vocab_size,
            api_keys, traces, loading.result(), on_stalls=[one.end_group for one in supervisors],
        )  # fmt: skip
        for supervisor, one in zip(supervisors, engine.engines, strict=True):
            supervisor.give_engine(one)
        spare_collector()
        engine.engine.start()
        load_adapters(config, engine)
        from autotp_serving.api.server import serve

        exit_code = serve(app, engine, config, sock)
        ignore_signals()
        if not exit_code and not engine.engine.shutdown():
            exit_code = 1
        return exit_code
    except RanksRefused as error:
        return report(str(error))
    except RanksLost as error:
        report(str(error))
        return 1
    finally:
        for supervisor in supervisors:
            supervisor.stop()


def part_folders(config: ServingConfig, group_name: str) -> ServingConfig:
    """Of several groups each keeps its KV blocks in a folder of its own."""
    if config.kv_offload_dir is None or not group_name:
        return config
    return replace(config, kv_offload_dir=f"{config.kv_offload_dir}/group-{group_name}")


def load_ahead(config: ServingConfig) -> LoadedTokenizer:
    """In the head, while its ranks start: what it serves with, the model's tokenizer with it."""
    if not config.trust_remote_code:  # by which code may come that imports torch
        do_without_torch()
    with without_collector():
        import autotp_serving.api.app
        import autotp_serving.api.server  # noqa: F401
        from autotp_serving.engine.tokenizer_files import load_tokenizer

    return load_tokenizer(Path(config.model_path), config.trust_remote_code)


def do_without_torch() -> None:
    """Have transformers believe that there is no torch: the head needs its tokenizers alone.

    With torch it would start three seconds later and take four times the memory.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    log = logging.getLogger("transformers")
    log.addFilter(is_not_advice)
    with without_collector():
        import transformers  # noqa: F401
    log.removeFilter(is_not_advice)


def is_not_advice(_: logging.LogRecord) -> bool:
    """While transformers is imported without torch: all that it says is that there is none."""
    return False


def obey(head: HeadLine, group: RankGroup) -> int:
    """Rank 0 of a head: load, then run the steps that it sends."""
    with tell_start(group):
        worker = import_worker()(head.config, group, head.num_loading)
    assert worker.lead is not None, "only rank 0 leads"
    ignore_signals()
    spare_collector()
    group.all_gather("ready")
    head.run_steps(worker.lead, worker.max_model_len, worker.vocab_size, worker.device_kind)
    head.close()
    worker.lead.stop()
    return 0


def load_adapters(config: ServingConfig, engine: EngineClient) -> None:
    """Load what --lora-modules names into an engine that runs.

    Raises:
        ConfigError: one of them is not for this model.
    """
    from autotp_serving.engine import EngineError, EngineGroups
    from autotp_serving.engine.adapters import parse_adapters
    from autotp_serving.request import AdapterError

    for name, path in parse_adapters(config.lora_modules):
        assert not isinstance(engine.engine, EngineGroups), "the config refuses them"
        try:
            engine.engine.load_adapter(name, path).result()
        except (AdapterError, EngineError) as error:
            raise ConfigError(f"--lora-modules {name}={path}: {error}") from error


def check_before_loading(config: ServingConfig) -> tuple[ApiKeys, Traces | None]:
    """Read what HTTP and adapters need before minutes go into loading a model."""
    from autotp_serving.api.api_keys import load_api_keys
    from autotp_serving.api.port import check_tls
    from autotp_serving.engine.adapters import parse_adapters
    from autotp_serving.model.adapter_folder import read_adapter_folder
    from autotp_serving.request import AdapterError

    api_keys = load_api_keys(config, os.environ)
    check_tls(config)
    for name, path in parse_adapters(config.lora_modules):
        try:
            read_adapter_folder(Path(path), config.max_lora_rank)
        except AdapterError as error:
            raise ConfigError(f"--lora-modules {name}={path}: {error}") from error
    if config.otlp_traces_endpoint is None:
        return api_keys, None
    from autotp_serving.api.traces import open_traces

    return api_keys, open_traces(config)


def build_server(
    config: ServingConfig,
    runners: Sequence[Runner],
    max_model_len: int,
    vocab_size: int,
    api_keys: ApiKeys,
    traces: Traces | None,
    loaded: LoadedTokenizer | None = None,
    *,
    on_stalls: Sequence[Callable[[str], None]] = (),
    find_late_ranks: Callable[[], str] = lambda: "a rank hangs",
) -> tuple[FastAPI, EngineClient]:
    """Put engine and application together over ranks that are ready.

    Args:
        runners: one for each group of ranks.
        loaded: the model's tokenizer, where it is loaded already.
        on_stalls: told where a group's step does not end; none: its engine fails.
    """
    with without_collector():
        from autotp_serving.api.app import build_app
        from autotp_serving.api.engine_client import EngineClient
        from autotp_serving.engine import Engine, EngineGroups
        from autotp_serving.engine.sandbox import Sandbox
        from autotp_serving.engine.tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(
        Path(config.model_path),
        trust_remote_code=config.trust_remote_code,
        num_rows=vocab_size,
        loaded=loaded,
    )
    if config.draft_model is not None:
        tokenizer.check_draft(Path(config.draft_model), config.trust_remote_code)
    sandbox = Sandbox(tokenizer)
    sandbox.start()

    def make_engine(deliver: OutputSink) -> Engine | EngineGroups:
        if len(runners) > 1:
            return EngineGroups(runners, tokenizer, config, max_model_len, deliver, on_stalls)
        return Engine(
            runners[0],
            tokenizer,
            config,
            max_model_len,
            deliver,
            on_stall=on_stalls[0] if on_stalls else None,
            find_late_ranks=find_late_ranks,
        )

    engine = EngineClient(make_engine, config.request_timeout)
    app = build_app(engine, tokenizer, config, max_model_len, api_keys, sandbox, traces)
    return app, engine


def plan(config: ServingConfig, group: RankGroup, num_ranks: int) -> int:
    """Rank 0: print what the model will take on each rank. The others have nothing to do."""
    if group.rank == 0:
        from autotp_serving.memory.planner import print_plan

        # Without a launcher to say otherwise, all ranks are on one host.
        local_size = group.local_size if group.size > 1 else num_ranks
        print_plan(config, num_ranks, local_size)
    group.all_gather("planned")
    return 0


def save(config: ServingConfig, group: RankGroup) -> int:
    """All ranks: convert the checkpoint into a folder that loads quickly, and leave."""
    from autotp_serving.distributed.collectives import join_for_exchange
    from autotp_serving.model.loader import read_model_config
    from autotp_serving.model.save import save_low_bit

    join_for_exchange(group)
    save_low_bit(config, read_model_config(config), group)
    return 0


def follow(config: ServingConfig, group: RankGroup, head: HeadLine | None = None) -> int:
    """Other ranks: load, then obey rank 0, which alone decides when to stop.

    Where there is a head, that notices when one of them is lost.
    """
    worker = import_worker()(config, group, head.num_loading if head else 1)
    ignore_signals()
    spare_collector()
    group.all_gather("ready")
    if head is None:
        worker.channel.monitor(partial(leave_group, group.rank), config.step_timeout)
    worker.runner.follow(worker.channel)
    if head is not None:
        head.close()
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
